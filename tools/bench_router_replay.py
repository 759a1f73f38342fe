"""How far trainer and engine are apart in bfloat16 with and without router replay, and what replay costs.

    python tools/bench_router_replay.py --output docs/benchmarks/router_replay_cpu2.json

Runs examples/moe_embedded.sh's job twice, on 4 CPU ranks. Means are over all steps: in the first the samples of both
runs are the same, later each policy is its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark_file import Row, installed, write

from mrl.observability.report import read_metrics

_EXAMPLE = Path(__file__).parents[1] / "examples/moe_embedded.sh"
_METRICS = {
    "parity/log_prob_abs_diff_mean": "nat",
    "parity/log_prob_abs_diff_max": "nat",
    "parity/kl_k3": "nat",
    "time/step_s": "s",
    "time/rollout_s": "s",
    "time/update_actor_s": "s",
}


def run(mode: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """The metrics of every step of a run with this `router_replay.mode`."""
    overrides = [
        f"actor_rollout_ref.actor.megatron.router_replay.mode={mode}",
        "actor_rollout_ref.actor.megatron.dtype=bfloat16",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.logger=[file]",
        f"trainer.default_local_dir={folder / mode}",
    ]
    subprocess.run(["sh", str(_EXAMPLE), *overrides], env={**os.environ, "PYTHON": sys.executable}, check=True)
    return [row for row in read_metrics(folder / mode) if "time/step_s" in row]


def main() -> None:
    """Run both jobs and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {mode: run(mode, arguments.steps, Path(folder)) for mode in ("disabled", "R3")}
    rows = []
    for case, chosen in (("first step", slice(0, 1)), ("all steps", slice(None))):
        for metric, unit in _METRICS.items():
            means = {
                mode: sum(step[metric] for step in steps[chosen]) / len(steps[chosen]) for mode, steps in runs.items()
            }
            rows.append(
                Row(case=case, metric=metric, value=means["R3"], unit=unit, peers={"disabled": means["disabled"]})
            )
    for row in rows:
        print(f"{row.case:10s} {row.metric:32s} {row.value:.3g} {row.unit}, without replay {row.peers['disabled']:.3g}")
    if arguments.output:
        write(arguments.output, "router_replay", rows, installed(("torch", "sglang", "megatron-core", "transformers")))


if __name__ == "__main__":
    main()
