"""What the processes of a job tell each other about its failure, through the job's store.

The first failure that is published is the job's: whoever fails later, most likely because of it, finds it there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from mrl.launch.environment import RankEnvironment
from mrl.launch.store import connect_store

if TYPE_CHECKING:
    import torch.distributed as dist

_CALL_TIMEOUT = timedelta(seconds=10)
_POLL_S = 0.1
_ECHOES = (
    "onnection closed by peer",
    "onnection reset by peer",
    "onnection was likely closed",
    "Connection refused",
    "Socket Timeout",
    "DistBackendError",
    "DistNetworkError",
)
"""What a rank's error says when another rank, or the store, has gone away."""


@dataclass(kw_only=True, frozen=True)
class Failure:
    """Why a run ends."""

    rank: int
    kind: Literal["error", "died", "hang"]
    message: str
    user_error: bool = False
    """Whether the message tells a user what to do; such a run fails again when it is restarted."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}"


class PeerFailedError(RuntimeError):
    """Another rank failed first; the message is that rank's."""


def is_echo(message: str) -> bool:
    """Whether an error says no more than that another rank is gone."""
    return any(mark in message for mark in _ECHOES)


class FailureBoard:
    """One attempt's failure, and what ranks report of a hang."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def publish(self, failure: Failure) -> Failure:
        """Make this the job's failure unless there is one already; returns the job's failure."""
        first = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        return Failure(**json.loads(first))

    def first(self, *, wait_s: float = 0.0) -> Failure | None:
        """The job's failure, if there is one within `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not self._store.check(["failure"]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)
        return Failure(**json.loads(self._store.get("failure")))

    def put(self, name: str, value: Any) -> None:
        """Leave a JSON value for the others."""
        self._store.set(name, json.dumps(value))

    def get(self, name: str) -> Any | None:
        """A value that was left under this name, None if there is none."""
        return json.loads(self._store.get(name)) if self._store.check([name]) else None


def open_board(env: RankEnvironment) -> FailureBoard:
    """The board of this attempt of the job, over a connection of its own.

    Raises:
        ValueError: the store does not answer.
    """
    import torch.distributed as dist

    store = connect_store(env.master_addr, env.master_port, timeout=_CALL_TIMEOUT)
    return FailureBoard(dist.PrefixStore(f"board/{env.attempt}", store))
