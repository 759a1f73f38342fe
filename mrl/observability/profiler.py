"""Where the time and the memory of single steps go: torch's traces and snapshots, and names of phases in them."""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Not torch.profiler's own, which imports the compiler to start: seconds, in the middle of a run.
from torch.autograd.profiler import profile, record_function

logger = logging.getLogger(__name__)

_MEMORY_EVENTS = 200_000
"""Allocations that a snapshot remembers, the last ones; each takes about a kilobyte."""


@contextmanager
def phase_range(phase: str) -> Iterator[None]:
    """Name the block in whatever looks on: a torch trace, where one is being taken, and, with CUDA, NVTX.

    Nothing else happens: no work is waited for.
    """
    nvtx = torch.cuda.is_initialized()
    name = f"phase/{phase}"
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        if torch.autograd._profiler_enabled():
            with record_function(name):
                yield
        else:
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Traces the chosen steps of this rank's process; its engine's processes are not seen.

    Args:
        steps: none where this rank is not to be traced.
        folder: takes `step_<n>_rank_<r>.json.gz`, a chrome trace, and with CUDA `step_<n>_rank_<r>.memory.pickle`.
    """

    def __init__(self, steps: Collection[int], *, folder: Path, rank: int, device: str) -> None:
        self._steps = frozenset(steps)
        self._folder = folder
        self._rank = rank
        self._on_gpu = device == "cuda"

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Trace the block if `step` is one of the chosen; the files are written when it ends, unless it fails."""
        if step not in self._steps:
            yield
            return
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS, stacks="python")
        try:
            with profile(use_device="cuda" if self._on_gpu else None, use_kineto=True) as trace:
                yield
            self._write(trace, step)
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, trace: profile, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step}_rank_{self._rank}"
        path = self._folder / f"{name}.json.gz"
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".json") as plain:
            trace.export_chrome_trace(plain.name)
            with open(plain.name, "rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        logger.info("step %d of rank %d is traced in %s", step, self._rank, path)
