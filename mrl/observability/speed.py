"""Finding a slow host: every rank does the same small piece of work, once a step.

Ranks wait for each other many times in a phase, so each phase takes as long on all of them as on the slowest, and no
phase's time tells which rank that is. Work that needs no other rank does.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mrl.parallel.agreement import gather_results

logger = logging.getLogger(__name__)

SLOW_RATIO = 1.5
"""How many times the median a rank's time has to be to be called slow."""
_PATIENCE_STEPS = 3
_REPEATS = 5
_SIDE = {"cpu": 192, "cuda": 4096}
"""Of the matrices that are multiplied: about 0.3 ms on one core, or on one H100."""


class SpeedWatch:
    """Compares the ranks' speed. Built and called by all ranks.

    Args:
        measure: seconds that this rank takes for the piece of work.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self._hosts = gather_results(socket.gethostname)
        self._slow: dict[int, int] = {}

    def __call__(self) -> dict[str, float]:
        """`time/slowest_rank_ratio`: the slowest rank's time over the median's; a rank that stays slow is named."""
        seconds = self._gather(self._measure())
        median = statistics.median_low(seconds)
        for rank in self._still_slow(seconds, median):
            logger.warning(
                "rank %d on host %s has been %.1f times slower than the median rank for %d steps, and all ranks wait "
                "for it; look for throttling, other load or a failing device there",
                rank,
                self._hosts[rank],
                seconds[rank] / median,
                _PATIENCE_STEPS,
            )
        return {"time/slowest_rank_ratio": max(seconds) / median}

    def _gather(self, mine: float) -> list[float]:
        if len(self._hosts) == 1:
            return [mine]
        seconds = torch.zeros(len(self._hosts), dtype=torch.float64)
        seconds[dist.get_rank()] = mine
        dist.all_reduce(seconds)
        return seconds.tolist()

    def _still_slow(self, seconds: Sequence[float], median: float) -> list[int]:
        """The ranks to name now; each once for as long as it stays slow. None but on rank 0."""
        slow = [rank for rank, each in enumerate(seconds) if each > SLOW_RATIO * median]
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        first = not dist.is_initialized() or dist.get_rank() == 0
        return [rank for rank, steps in self._slow.items() if first and steps == _PATIENCE_STEPS]


def time_matmul(device: str) -> float:
    """Seconds of a matrix product on "cpu" or "cuda", the best of a few: a scheduler's pause does not count."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    matrix = torch.ones(_SIDE[device], _SIDE[device], dtype=dtype, device=device)
    return min(_time_once(matrix) for _ in range(_REPEATS))


def _time_once(matrix: torch.Tensor) -> float:
    begin = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
