"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up seconds per phase until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the `with` block towards `phase`; an exception counts too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`time/<phase>_s` of every phase since the last call."""
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return metrics
