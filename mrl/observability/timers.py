"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

OUTSIDE = "loop"
"""The phase between all others."""


class PhaseTimer:
    """Adds up seconds per phase until they are taken.

    Args:
        watch: called with the phase that begins, or goes on because one inside it has ended.
        span: entered with the name of every phase, for as long as it lasts.
    """

    def __init__(
        self,
        watch: Callable[[str], None] | None = None,
        span: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._seconds: dict[str, float] = {}
        self._watch = watch
        self._span = span
        self._open = [OUTSIDE]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the `with` block towards `phase`; an exception counts too."""
        start = time.perf_counter()
        try:
            with self.watched(phase):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def watched(self, phase: str) -> Iterator[None]:
        """Have the `with` block watched as `phase`, without counting its time."""
        self._open.append(phase)
        self._tell()
        try:
            with self._span(phase):
                yield
        finally:
            self._open.pop()
        # Not after an exception: the phase that failed is what a report should name.
        self._tell()

    def _tell(self) -> None:
        if self._watch is not None:
            self._watch(self._open[-1])

    def take(self) -> dict[str, float]:
        """`time/<phase>_s` of every phase since the last call."""
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return metrics
