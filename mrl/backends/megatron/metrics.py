"""Combining the metrics of micro-batches and of data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from mrl.types import Metric, Reduction

ReducedMetrics = dict[str, tuple[float, Reduction]]

_COMBINE: dict[str, Callable[[float, float], float]] = {"sum": lambda a, b: a + b, "max": max, "min": min}


def reduce_micro_batches(contributions: Iterable[Mapping[str, Metric]]) -> ReducedMetrics:
    """One number per name from a rank's micro-batches, read from the device at once."""
    named = [(name, metric) for metrics in contributions for name, metric in metrics.items()]
    if not named:
        return {}
    values = torch.stack([metric.value.detach().float().reshape(()) for _, metric in named]).tolist()
    return _combine((name, value, metric.reduction) for (name, metric), value in zip(named, values, strict=True))


def merge_ranks(reports: Iterable[ReducedMetrics]) -> dict[str, float]:
    """One number per name from the data-parallel ranks' reports, in their order."""
    combined = _combine((name, *entry) for report in reports for name, entry in report.items())
    return {name: value for name, (value, _) in combined.items()}


def _combine(entries: Iterable[tuple[str, float, Reduction]]) -> ReducedMetrics:
    combined: ReducedMetrics = {}
    for name, value, reduction in entries:
        if name not in combined:
            combined[name] = (value, reduction)
            continue
        total, first_reduction = combined[name]
        if reduction != first_reduction:
            raise ValueError(f"metric {name} is declared to be reduced by {first_reduction} and by {reduction}")
        combined[name] = (_COMBINE[reduction](total, value), reduction)
    return combined
