"""Rows of a benchmark of whole steps, from what the trainer logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmark_file import Row

Step = Mapping[str, float]

PASSES = ("log_prob", "ref_log_prob", "value", "update_critic", "update_actor")
"""Phases in which models run forward, backward or through an optimizer."""
OVERHEAD_LIMIT = 0.05
ROLLOUT_LIMIT = 0.95


def phase_rows(case: str, steps: Sequence[Step]) -> list[Row]:
    """Median seconds of each phase and of the whole step, and the share that is neither rollout nor a model's pass."""
    phases = {key.removeprefix("time/").removesuffix("_s") for step in steps for key in step if _is_phase(key)}
    seconds = {phase: median(step.get(f"time/{phase}_s", 0.0) for step in steps) for phase in sorted(phases)}
    whole = median(step["time/step_s"] for step in steps)
    share = median(overhead(step) for step in steps)
    rows = [Row(case=case, metric=f"time/{phase}", value=value, unit="s") for phase, value in seconds.items()]
    untimed = median(step["time/step_s"] - sum(_seconds(step, phase) for phase in phases) for step in steps)
    return [
        *rows,
        Row(case=case, metric="time/between phases", value=untimed, unit="s"),
        Row(case=case, metric="time/step", value=whole, unit="s"),
        Row(
            case=case,
            metric="overhead",
            value=100 * share,
            unit="% of step",
            limit=100 * OVERHEAD_LIMIT,
            ratio=OVERHEAD_LIMIT / max(share, 1e-9),
        ),
        *_memory_rows(case, steps),
    ]


def overhead(step: Step) -> float:
    """Share of the step that is neither rollout nor a model's pass, phases that nobody timed included."""
    work = sum(_seconds(step, phase) for phase in ("rollout", *PASSES))
    return 1 - work / step["time/step_s"]


def rollout_rows(case: str, steps: Sequence[Step], alone: float) -> list[Row]:
    """Tokens/s of the rollout phase, against what the engines' own `generate` reached on the same prompts.

    Args:
        alone: tokens/s of all engines; 0 where it was not measured.
    """
    value = median(step["rollout/tokens_per_s"] for step in steps)
    ratio = value / alone if alone else None
    row = Row(case=case, metric="rollout", value=value, unit="tokens/s", limit=alone or None, ratio=ratio, peers={})
    return [row]


def _memory_rows(case: str, steps: Sequence[Step]) -> list[Row]:
    keys = tuple(f"memory/{name}_gib" for name in ("peak", "train", "rollout", "residue", "host_pinned"))
    most = {key: max(step.get(key, 0.0) for step in steps) for key in keys}
    return [Row(case=case, metric=key, value=value, unit="GiB") for key, value in most.items() if value]


def _is_phase(key: str) -> bool:
    return key.startswith("time/") and key.endswith("_s") and key not in ("time/step_s", "time/validation_s")


def _seconds(step: Step, phase: str) -> float:
    return step.get(f"time/{phase}_s", 0.0)
