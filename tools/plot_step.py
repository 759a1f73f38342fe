"""Stacked time per phase of `bench_step.py`'s results; needs matplotlib (`pip install mrl[plot]`).

python tools/plot_step.py docs/benchmarks/step_*.json --output docs/benchmarks/step.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

ORDER = ("rollout", "reward", "log_prob", "ref_log_prob", "value", "advantage", "update_critic", "update_actor")
"""Of the phases as a step runs through them; what is not named here follows by name."""


def read_phases(path: Path) -> tuple[str, dict[str, float]]:
    """A label and the seconds of each phase of one result.

    Raises:
        ValueError: the file holds no phases.
    """
    result = json.loads(path.read_text())
    seconds = {row["metric"].removeprefix("time/"): row["value"] for row in result["rows"] if _is_phase(row["metric"])}
    if not seconds:
        raise ValueError(f"{path} holds no time/* rows; name files that bench_step.py wrote")
    return f"{path.stem}: {result['rows'][0]['case']}", seconds


def _is_phase(metric: str) -> bool:
    return metric.startswith("time/") and metric != "time/step"


def main() -> None:
    """Draw one bar per file, each as long as its step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="its suffix chooses the format")
    arguments = parser.parse_args()
    results = [read_phases(path) for path in arguments.results]
    named = {phase for _, seconds in results for phase in seconds}
    phases = [phase for phase in ORDER if phase in named] + sorted(named.difference(ORDER))
    figure, axes = plt.subplots(figsize=(11, 1.8 + 0.9 * len(results)), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for position, (_, seconds) in enumerate(results):
        start = 0.0
        for phase, color in zip(phases, colors, strict=False):
            width = seconds.get(phase, 0.0)
            axes.barh(position, width, left=start, color=color, label=phase if position == 0 else None)
            start += width
    axes.set_yticks(range(len(results)), [label for label, _ in results])
    axes.set_xlabel("seconds of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(arguments.output)


if __name__ == "__main__":
    main()
