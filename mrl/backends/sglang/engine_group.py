"""The process group over all engine ranks of a job, which carries weights between hosts.

It is made beside SGLang's own groups, which it leaves alone, and meets through the job's store. Every update begins
with a round of that store: all ranks report that they are ready, or the first that cannot take part says why, so that
none waits for a peer that will not come. A rank that fails later says why there, too; who waits looks there now and
then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mrl.reshard.errors import ReshardError
from mrl.reshard.exchange import Finish
from mrl.reshard.routes import EnginePlaces

_READY = b"ready"
_KEYS = ("present", "arrived", "verdict", "failure")
_TAGS = 2**20
_SHORTEST_WAIT = timedelta(milliseconds=1)
_LOOK_S = 0.25
"""Between looks at the store while a message is under way."""

_DEVICE_POLL_S = 1e-4

_formed: list[Any] = []
"""Every group of this process, to keep it. gloo's destructor may join its own thread for ever, with the interpreter
locked, when a connection is just being made or a message is under way."""


@dataclass(kw_only=True, frozen=True)
class MeetingPoint:
    """Where the engine ranks of one source layout meet; JSON-serialisable by `vars`."""

    host: str
    port: int
    name: str
    """Prefix of the keys: another one for each group."""
    timeout_s: float
    """For a whole update."""


class EngineGroup:
    """Implements `mrl.reshard.exchange.Wire` on a device: gloo on CPU, NCCL on GPUs."""

    def __init__(self, point: MeetingPoint, places: EnginePlaces, device: torch.device) -> None:
        self._point, self._places, self._device = point, places, device
        self._store: Any = None
        self._group: Any = None
        self._tags: dict[tuple[int, bool], int] = {}
        self._round = ""
        self._deadline = 0.0

    def begin(self, round_name: str) -> None:
        """Wait until all engine ranks are ready for this round, which no other has the name of. Called by all of them.

        Raises:
            ReshardError: some rank cannot take part, and why, or did not come in time.
        """
        previous, self._round = self._round, round_name
        self._deadline = time.monotonic() + self._point.timeout_s
        store = self.store
        store.append(self._key("present"), f"{self._places.rank},")
        if store.add(self._key("arrived"), 1) == len(self._places.hosts):
            store.compare_set(self._key("verdict"), "", _READY.decode())
        try:
            store.wait([self._key("verdict")], self._remaining())
        except dist.DistStoreError as error:
            raise ReshardError(
                f"{self._absent(store)} did not come to the exchange of weights within {self._point.timeout_s:.0f} s"
            ) from error
        verdict = store.get(self._key("verdict"))
        if verdict != _READY:
            raise ReshardError(f"the exchange of weights was given up: {verdict.decode()}")
        if self._group is None:
            self._group = self._form(store)
            _formed.append(self._group)
        if previous and self._places.rank == 0:
            # All are in this round, so none needs the keys of the last one.
            for name in _KEYS:
                store.delete_key(f"{self._point.name}/{previous}/{name}")

    def send(self, tensor: Tensor, peer: int) -> Finish:
        """Start sending a tensor to an engine rank."""
        return self._start(tensor, peer, sending=True)

    def receive(self, tensor: Tensor, peer: int) -> Finish:
        """Start receiving a tensor from an engine rank."""
        return self._start(tensor, peer, sending=False)

    def give_up(self, round_name: str, reason: str) -> None:
        """Tell all engine ranks why this one cannot go on, unless another was first, and leave the group."""
        self._round = round_name
        text = f"engine rank {self._places.rank} on {self._places.host}: {reason}"
        for key in ("verdict", "failure"):
            self.store.compare_set(self._key(key), "", text)
        self.close()

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    @property
    def store(self) -> Any:
        """This process's client of the job's store."""
        if self._store is None:
            self._store = dist.TCPStore(
                self._point.host,
                self._point.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._point.timeout_s),
            )
        return self._store

    def _form(self, store: Any) -> Any:
        own = dist.PrefixStore(f"{self._point.name}/group", store)
        rank, size, timeout = self._places.rank, len(self._places.hosts), timedelta(seconds=self._point.timeout_s)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            # This side gives up first, with a reason; NCCL's own watchdog would end the process.
            options._timeout = 2 * timeout
            return dist.ProcessGroupNCCL(own, rank, size, options)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        # Only pairs that have something to send each other connect.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._places.host, lazy_init=True)]
        return dist.ProcessGroupGloo(own, rank, size, options)

    def _start(self, tensor: Tensor, peer: int, *, sending: bool) -> Finish:
        tag = self._tags[peer, sending] = (self._tags.get((peer, sending), -1) + 1) % _TAGS
        try:
            work = (self._group.send if sending else self._group.recv)([tensor], peer, tag)
        except RuntimeError as error:
            raise self._failure(peer, str(error)) from error
        on_gpu = self._device.type == "cuda"
        return partial(self._finish, peer, _StreamWait(work) if on_gpu else _ThreadWait(work, self._remaining()))

    def _finish(self, peer: int, waiting: _ThreadWait | _StreamWait) -> None:
        while True:
            try:
                if waiting.ended(within_s=_LOOK_S):
                    return
            except RuntimeError as error:
                raise self._failure(peer, str(error)) from error
            if self.store.check([self._key("failure")]) or time.monotonic() > self._deadline:
                raise self._failure(peer, "it is silent")

    def _failure(self, peer: int, what: str) -> ReshardError:
        store = self.store
        if store.check([self._key("failure")]):
            reason = store.get(self._key("failure")).decode()
        else:
            reason = (
                f"engine rank {peer} on {self._places.hosts[peer]} is gone, or did not answer within "
                f"{self._point.timeout_s:.0f} s ({what})"
            )
        return ReshardError(f"the exchange of weights was given up: {reason}")

    def _remaining(self) -> timedelta:
        return max(_SHORTEST_WAIT, timedelta(seconds=self._deadline - time.monotonic()))

    def _absent(self, store: Any) -> str:
        present = {int(rank) for rank in store.get(self._key("present")).decode().split(",") if rank}
        absent = [rank for rank in range(len(self._places.hosts)) if rank not in present]
        return _named(absent, self._places.hosts)

    def _key(self, name: str) -> str:
        return f"{self._point.name}/{self._round}/{name}"


class _ThreadWait:
    """Waits for a gloo transfer in a thread: gloo itself cannot look whether one is through, nor give one up."""

    def __init__(self, work: Any, timeout: timedelta) -> None:
        self._through = threading.Event()
        self._error: RuntimeError | None = None
        threading.Thread(target=self._wait, args=(work, timeout), name="exchange", daemon=True).start()

    def ended(self, *, within_s: float) -> bool:
        """Whether the transfer ended; RuntimeError if it failed."""
        # Asked once: what ends between two looks would pass as ended well.
        through = self._through.wait(within_s)
        if through and self._error is not None:
            raise self._error
        return through

    def _wait(self, work: Any, timeout: timedelta) -> None:
        try:
            # Gloo answers False where a transfer was broken off: nothing has arrived then.
            if not work.wait(timeout):
                self._error = RuntimeError("the transfer was broken off")
        except RuntimeError as error:
            self._error = error
        self._through.set()


class _StreamWait:
    """Waits for an NCCL transfer, which the current stream waits for in its turn."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._event: torch.cuda.Event | None = None

    def ended(self, *, within_s: float) -> bool:
        """Whether the transfer ended; RuntimeError if it failed."""
        if self._event is None:
            self._work.wait()
            self._event = torch.cuda.Event()
            self._event.record()
        until = time.monotonic() + within_s
        while not self._event.query():
            if time.monotonic() > until:
                return False
            time.sleep(_DEVICE_POLL_S)
        return True


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    some = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks[:8])
    return f"engine ranks {some}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
