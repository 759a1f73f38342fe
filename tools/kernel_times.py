"""What a device did during a call, from torch's profiler: time per kernel, and the gaps in which it did nothing."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_SHORT_US = 5.0
"""Between two kernels that were launched in time lie a few microseconds."""


@dataclass(frozen=True)
class Work:
    """A kernel or a copy; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """Time in which nothing ran, between two kernels."""

    us: float
    before: str
    after: str


@dataclass(frozen=True)
class DeviceTimes:
    """Sums over one call, in ms."""

    span_ms: float
    """From the first kernel to the end of the last."""
    busy_ms: float
    """Of it, with at least one kernel running."""
    kernels: list[tuple[str, float, int]]
    """Name, time and number of calls; longest first."""
    gaps: list[Gap]
    """Longest first, without those between kernels that followed at once."""

    def table(self, most: int = 15) -> str:
        """The kernels and the gaps that take most, to be read."""
        lines = [f"  device busy {self.busy_ms:.2f} of {self.span_ms:.2f} ms"]
        for name, ms, count in self.kernels[:most]:
            lines.append(f"  {ms:9.3f} ms {ms / self.span_ms:6.1%} {count:5d} x {name[:100]}")
        idle = sum(gap.us for gap in self.gaps) / 1e3
        lines.append(f"  {idle:9.3f} ms {idle / self.span_ms:6.1%} {len(self.gaps):5d} gaps over {_SHORT_US:.0f} us:")
        for gap in self.gaps[:most]:
            lines.append(f"  {gap.us / 1e3:9.3f} ms after {gap.before[:45]:45s} before {gap.after[:45]}")
        return "\n".join(lines)


def profile_call(call: Callable[[], Any]) -> DeviceTimes | None:
    """Run the call under the profiler; None without a CUDA device."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summarize(json.loads(path.read_text())["traceEvents"])


def summarize(events: Sequence[dict[str, Any]]) -> DeviceTimes:
    """The sums over the events of a chrome trace.

    Raises:
        ValueError: no kernel is among them.
    """
    work = sorted(
        (Work(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if _on_device(event)),
        key=lambda item: item.start,
    )
    if not work:
        raise ValueError("the trace holds no kernel: the profiler saw no CUDA activity")
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for item in work:
        sums[item.name] += (item.end - item.start) / 1e3
        counts[item.name] += 1
    gaps, idle = _gaps(work)
    span = (max(item.end for item in work) - work[0].start) / 1e3
    kernels = sorted(((name, ms, counts[name]) for name, ms in sums.items()), key=lambda row: -row[1])
    return DeviceTimes(span_ms=span, busy_ms=span - idle / 1e3, kernels=kernels, gaps=gaps)


def _on_device(event: dict[str, Any]) -> bool:
    return event.get("cat") in _DEVICE_WORK and "dur" in event


def _gaps(work: Sequence[Work]) -> tuple[list[Gap], float]:
    """The gaps worth a look, longest first, and the sum of all, in microseconds; `work` is sorted by its start."""
    gaps, idle, last = [], 0.0, work[0]
    for _, item in pairwise(work):
        if item.start > last.end:
            idle += item.start - last.end
            gaps.append(Gap(item.start - last.end, last.name, item.name))
        if item.end > last.end:
            last = item
    return sorted((gap for gap in gaps if gap.us > _SHORT_US), key=lambda gap: -gap.us), idle
