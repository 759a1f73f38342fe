"""A run in a few lines, read from its `metrics.jsonl`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mrl.observability.console import show_table

Row = dict[str, Any]


def summarize_run(run_dir: Path, *, wall_s: float | None = None) -> list[tuple[str, str]]:
    """Name and value of what a person asks first of a run.

    Raises:
        ValueError: the folder holds no metrics.
    """
    rows = read_metrics(run_dir)
    steps = [row for row in rows if "reward/mean" in row]
    validations = [(row["step"], row["val/reward_mean"]) for row in rows if "val/reward_mean" in row]
    lines = [("steps", str(len(steps)))]
    if steps:
        lines.append(("reward, first -> last step", f"{steps[0]['reward/mean']:.3f} -> {steps[-1]['reward/mean']:.3f}"))
    if validations:
        lines.append(("validation reward", "  ".join(f"{value:.3f} @{step}" for step, value in validations)))
    if steps:
        lines += _medians(steps)
    if wall_s is not None:
        lines.append(("wall time", f"{wall_s:.0f} s"))
    return [*lines, ("files", str(run_dir))]


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows of a run's `metrics.jsonl`.

    Raises:
        ValueError: there is no such file.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no metrics.jsonl; name the folder trainer.default_local_dir of a run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _medians(steps: list[Row]) -> list[tuple[str, str]]:
    def typical(key: str) -> float:
        return median(row[key] for row in steps if row.get(key) is not None)

    phases = sorted(
        key
        for key in steps[-1]
        if key.startswith("time/") and key.endswith("_s") and key not in ("time/step_s", "time/validation_s")
    )
    shares = "  ".join(f"{key[5:-2]} {typical(key):.3f}" for key in phases)
    return [
        ("rollout tokens per second", f"{typical('rollout/tokens_per_s'):.0f}"),
        ("step time", f"{typical('time/step_s'):.3f} s"),
        ("  of it, seconds", shares),
        ("reshard", f"{typical('time/reshard_s') * 1e3:.1f} ms, {typical('reshard/bytes') / 2**20:.1f} MiB"),
        ("trainer-engine log-prob difference", f"{_worst_parity(steps):.1e}"),
    ]


def _worst_parity(steps: list[Row]) -> float:
    """Of the batch before its updates or, in rollout correction's bypass mode, of the updates themselves."""
    keys = ("parity/log_prob_abs_diff_mean", "actor/rollout_log_prob_abs_diff_mean")
    return max(row[key] for row in steps for key in keys if row.get(key) is not None)


def main(argv: Sequence[str]) -> int:
    """`mrl report DIR`: print the summary. Exit status 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="mrl report", description="summarize a run's folder")
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args(argv)
    try:
        rows = summarize_run(arguments.run_dir)
    except ValueError as error:
        sys.stderr.write(f"mrl report: {error}\n")
        return 2
    show_table(str(arguments.run_dir), rows)
    return 0
