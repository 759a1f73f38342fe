"""An engine's part on one host, and how the parts meet: through the job's key-value store.

SGLang would have its first process listen on a port that was free a moment ago, on every interface. Here all of an
engine's processes are clients of the store that the job has anyway.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from mrl.launch.addresses import join_host_port
from mrl.launch.store import connect_store

START_VARIABLE = "MRL_ENGINE_START"
"""Environment variable with the number of times the engine was started before: each start meets under its own name."""

_SCHEME = "mrl-store"
_SETTLE_S = 5.0


@dataclass(kw_only=True, frozen=True)
class EnginePart:
    """Which of an engine's hosts this is, and where they meet."""

    name: str
    """Of the engine; no other of the job has it."""
    store_host: str
    store_port: int
    num_hosts: int = 1
    host_index: int = 0

    @property
    def leads(self) -> bool:
        """Whether requests come in here; the other parts' processes get them from this one's."""
        return self.host_index == 0

    def server_args(self) -> dict[str, Any]:
        """What SGLang is told of the engine's hosts."""
        if self.num_hosts == 1:
            return {}
        place = join_host_port(self.store_host, self.store_port)
        return {"nnodes": self.num_hosts, "node_rank": self.host_index, "dist_init_addr": place}

    def environment(self, *, start: int = 0) -> dict[str, str]:
        """Environment variables of the processes of this part."""
        place = join_host_port(self.store_host, self.store_port)
        return {
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"{_SCHEME}://{place}/{self.name}",
            START_VARIABLE: str(start),
            # Else a part that does not lead serves health checks until its processes end, and returns only then.
            "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
        } | ({} if self.num_hosts == 1 else {"SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "false"})


def register_rendezvous() -> None:
    """Let torch.distributed of this process understand the address in `EnginePart.environment`."""
    dist.register_rendezvous_handler(_SCHEME, _rendezvous)


def _rendezvous(
    url: str, timeout: timedelta = default_pg_timeout, **kwargs: Any
) -> Iterator[tuple[dist.Store, int, int]]:
    parsed = urlparse(url)
    query = parse_qs(parsed.query)
    assert parsed.hostname is not None
    assert parsed.port is not None
    store = connect_store(parsed.hostname, parsed.port, timeout=timeout)
    name = f"{parsed.path.strip('/')}/{os.environ[START_VARIABLE]}"
    yield dist.PrefixStore(name, store), int(query["rank"][0]), int(query["world_size"][0])
    raise RuntimeError("an engine's processes meet once")


class FailureBoard:
    """Where the parts of an engine tell each other that one has failed, and why: no part sees another's processes."""

    def __init__(self, part: EnginePart, *, timeout: timedelta) -> None:
        self._part = part
        self._store = connect_store(part.store_host, part.store_port, timeout=timeout)
        self.start = 0
        """Which of the engine's starts is meant; failures of earlier ones are past."""

    def post(self, message: str) -> None:
        """Tell the other parts."""
        self._store.set(self._key(self._part.host_index), f"on {socket.gethostname()}: {message}")

    def read(self) -> list[str]:
        """What other parts have posted."""
        others = [self._key(index) for index in range(self._part.num_hosts) if index != self._part.host_index]
        return [self._store.get(key).decode() for key in others if self._store.check([key])]

    def read_soon(self) -> list[str]:
        """What other parts have posted, given a moment to do so."""
        deadline = time.monotonic() + _SETTLE_S
        while not (posted := self.read()) and time.monotonic() < deadline:
            time.sleep(_SETTLE_S / 20)
        return posted

    def _key(self, host_index: int) -> str:
        return f"{self._part.name}/failed/{self.start}/{host_index}"
