"""Times that follow from sizes and stated rates."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.reshard.plan import PlanStats
from mrl.scale.traffic import Traffic


@dataclass(kw_only=True, frozen=True)
class Rates:
    """GB/s of one GPU."""

    device_copy: float = 1510.0
    """Within its memory, one way; measured, H100 (docs/benchmarks/reshard_h100x2.json)."""
    nvlink: float = 374.0
    """From the other GPUs of its host; measured there, with both GPUs reading each other."""
    network: float = 50.0
    """Its share of the host's network: 400 Gb/s. Stated, not measured."""

    def __post_init__(self) -> None:
        for name, rate in (("device", self.device_copy), ("nvlink", self.nvlink), ("network", self.network)):
            if rate <= 0:
                raise ValueError(f"--{name}-gb-s = {rate} must be positive")


@dataclass(kw_only=True, frozen=True)
class ReshardTime:
    """Least time of an update on the slowest engine rank; its request and answer come on top."""

    copy_s: float
    """Memory, links and network busy together."""
    check_s: float
    """Summing what arrived, at the rate of half a copy."""

    @property
    def total_s(self) -> float:
        return self.copy_s + self.check_s


def predict_reshard(traffic: Traffic, rates: Rates) -> ReshardTime:
    """The time of the rank that takes longest."""
    return max((predict_rank(group.stats, rates) for group in traffic.groups), key=lambda time: time.total_s)


def predict_rank(stats: PlanStats, rates: Rates) -> ReshardTime:
    """The time of one engine rank."""
    ways = (
        stats.local_bytes / rates.device_copy,
        stats.same_host_bytes / rates.nvlink,
        max(stats.remote_bytes, stats.sent_bytes) / rates.network,
    )
    return ReshardTime(copy_s=max(ways) / 1e9, check_s=stats.bytes / (2 * rates.device_copy) / 1e9)


def bubble_fraction(*, pp: int, vpp: int | None, num_microbatches: int) -> float:
    """Share of an update in which a pipeline stage waits for others, where all stages and passes take equally long.

    Source: Narayanan et al., arXiv:2104.04473, section 2.2: (p - 1) / (v m) of the ideal time.
    """
    idle = (pp - 1) / ((vpp or 1) * num_microbatches)
    return idle / (1 + idle)
