"""A rank's share of its host's CPU for its own work on the global batch: advantages, metrics, padded tensors."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mrl.parallel.agreement import gather_results

logger = logging.getLogger(__name__)

_MOST_THREADS = 16
"""More gain nothing: what they work on has left the caches, and memory is as fast as it is."""
_KEPT_FREE = 2
"""Of each rank's cores: its engine's scheduler spins while it waits, and so do the threads of CUDA and NCCL."""
_TRIM_BYTES = 16 << 20


@dataclass(kw_only=True, frozen=True)
class Seat:
    """What a rank may run on."""

    host: str
    cores: frozenset[int]
    limit: float = float("inf")
    """Cores' worth of time that the rank's control group gets."""


def take_share(host: str, *, requested: int | None, on_gpu: bool) -> None:
    """Set the threads of this process's tensor work. Called by all ranks.

    Every rank takes equally many, as sums over a batch depend on how many threads share it, and all ranks must come to
    the same ones. Without a request that is the smallest share that any rank's cores allow; a CPU's ranks keep what
    OMP_NUM_THREADS gives them: models and engines work on the same cores.

    Args:
        host: names this rank's host.
        requested: `trainer.threads_per_rank`.
    """
    keep_freed_memory()
    if requested is None and not on_gpu:
        return
    threads = requested or fair_threads(gather_results(lambda: _seat(host)))
    torch.set_num_threads(threads)
    logger.info("CPU threads for each rank's own work: %d", threads)


def fair_threads(seats: Sequence[Seat]) -> int:
    """The most threads that every rank can have, where ranks with the same cores share them."""
    shares = [min(len(seat.cores), seat.limit) // count for seat, count in Counter(seats).items()]
    return max(1, min(_MOST_THREADS, int(min(shares)) - _KEPT_FREE))


def _seat(host: str) -> Seat:
    return Seat(host=host, cores=frozenset(os.sched_getaffinity(0)), limit=read_quota(Path("/sys/fs/cgroup/cpu.max")))


def read_quota(file: Path) -> float:
    """Cores' worth of time that a control group's `cpu.max` grants; infinite where there is no such file or limit."""
    if not file.is_file():
        return float("inf")
    quota, period = file.read_text().split()
    return float("inf") if quota == "max" else int(quota) / int(period)


def keep_freed_memory() -> None:
    """Have malloc keep what a tensor of up to 16 MiB leaves; the kernel would give it back page by page, zeroed.

    glibc raises its thresholds to the largest block that was mapped and freed.
    """
    torch.empty(_TRIM_BYTES, dtype=torch.uint8)
