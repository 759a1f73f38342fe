"""Processes that each hold one GPU and run what they are told, one function at a time."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

State = dict[str, Any]
"""What a worker keeps between calls; every function gets it first."""

_TIMEOUT_S = 180.0
_CLOSE_S = 3.0


class Worker:
    """One process on one GPU.

    Args:
        keep: the first content of its state; connections and barriers of the spawn context may be in it.
    """

    def __init__(self, device: int, keep: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, dict(keep)), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, function: Callable[..., Any], **arguments: Any) -> None:
        """Have the process run a function of an importable module."""
        self._link.send((function, arguments))

    def result(self) -> Any:
        """What the function returned; RuntimeError with its traceback if it raised, or did not end in time."""
        if not self._link.poll(_TIMEOUT_S):
            raise RuntimeError(f"worker {self._process.pid} did not answer within {_TIMEOUT_S:.0f} s")
        ok, value = self._link.recv()
        if not ok:
            raise RuntimeError(f"worker {self._process.pid} failed:\n{value}")
        return value

    def close(self) -> None:
        """End the process; also where it hangs."""
        self._link.close()
        self._process.join(_CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def run_all(
    workers: Sequence[Worker], function: Callable[..., Any], arguments: Iterable[Mapping[str, Any]] | None = None
) -> list[Any]:
    """What all workers return from one function, run at the same time."""
    for worker, own in zip(workers, arguments or [{}] * len(workers), strict=True):
        worker.start(function, **own)
    return [worker.result() for worker in workers]


def _serve(link: Connection, device: int, state: State) -> None:
    torch.cuda.set_device(device)
    while True:
        try:
            function, arguments = link.recv()
        except EOFError:
            return
        try:
            link.send((True, function(state, **arguments)))
        except Exception:
            link.send((False, traceback.format_exc()))
