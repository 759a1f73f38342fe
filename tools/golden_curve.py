"""Curves of a small, seeded job that later versions must reproduce.

    python tools/golden_curve.py write tests/golden/loss_cpu.json
    python tools/golden_curve.py check tests/golden/loss_cpu.json
    python tools/golden_curve.py write --device cuda tests/golden/loss_h100x1.json

`write` runs the job twice. A step may be off by five times the largest difference between the two, and by what another
processor's rounding does: a share of the curve that grows to 1 % at the last step (fifty times what another instruction
set was seen to do), and a ten-thousandth of the curve's largest value.
`check` runs it once, on the device of the file, and exits with 1 where a step is further away than that. A change that
is meant to move the curves writes them anew, and its commit says why.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmark_file import installed

from mrl.observability.report import read_metrics
from mrl.trainer import main_ppo

Curves = dict[str, list[float]]

METRICS = (
    "actor/loss",
    "actor/grad_norm",
    "actor/entropy",
    "actor/kl",
    "critic/loss",
    "critic/grad_norm",
    "reward/mean",
)
STEPS = 20
_SPREADS = 5.0
_LAST_SHARE = 0.01
_FLOOR = 1e-4
_PACKAGES = ("torch", "sglang", "megatron-core", "transformer-engine")
_JOB = (
    f"trainer.total_training_steps={STEPS}",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "trainer.logger=[file]",
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.actor.ppo_epochs=1",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
    "critic.ppo_micro_batch_size_per_gpu=4",
    "critic.megatron.pipeline_model_parallel_size=1",
)
_DEVICES = {
    # Actor at TP2, critic at DP2, one engine at TP2.
    "cpu": ("trainer.device=cpu", "trainer.n_gpus_per_node=2"),
    "cuda": (
        "trainer.device=cuda",
        "trainer.n_gpus_per_node=1",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        "actor_rollout_ref.actor.megatron.dtype=bfloat16",
        "critic.megatron.dtype=bfloat16",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=triton",
    ),
}


def job_arguments(device: str, run_dir: Path) -> list[str]:
    """Of the training command."""
    return ["--config-name=demo", *_JOB, *_DEVICES[device], f"trainer.default_local_dir={run_dir}"]


def read_curves(run_dir: Path) -> Curves:
    """What the job wrote, a value per step, by metric."""
    rows = [row for row in read_metrics(run_dir) if "actor/loss" in row]
    return {metric: [row[metric] for row in rows] for metric in METRICS}


def run_job(device: str) -> Curves:
    """Train in a folder of its own; the curves by metric.

    Raises:
        RuntimeError: the job failed; what it printed says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        status = main_ppo.main(job_arguments(device, run_dir))
        if status != 0:
            raise RuntimeError(f"the job ended with status {status}")
        return read_curves(run_dir)


def tolerances(curves: Curves, again: Curves) -> Curves:
    """How far each step of each curve may be off, from two runs of the same job."""
    return {name: _tolerance(curve, largest_difference(curve, again[name])) for name, curve in curves.items()}


def _tolerance(curve: Sequence[float], spread: float) -> list[float]:
    floor = _FLOOR * max(map(abs, curve))
    grown = [(step + 1) / len(curve) for step in range(len(curve))]
    return [
        _SPREADS * spread + share * (_LAST_SHARE * abs(value) + floor)
        for value, share in zip(curve, grown, strict=True)
    ]


def differences(expected: Curves, found: Curves, allowed: Curves) -> list[str]:
    """A line for each curve that leaves its tolerance: where first, and by how much."""
    lines = []
    for name, curve in expected.items():
        if len(found[name]) != len(curve):
            lines.append(f"{name}: {len(found[name])} steps instead of {len(curve)}")
            continue
        steps = list(zip(curve, found[name], allowed[name], strict=True))
        beyond = [step for step, (old, new, limit) in enumerate(steps) if _apart(old, new) > limit]
        if beyond:
            old, new, limit = steps[beyond[0]]
            lines.append(
                f"{name}: {new:.6g} instead of {old:.6g} at step {beyond[0] + 1}, tolerance {limit:.2g}; beyond it at "
                f"{len(beyond)} of {len(curve)} steps"
            )
    return lines


def largest_difference(curve: Sequence[float], other: Sequence[float]) -> float:
    """Of two curves of the same length, at any step; infinite where one is not a number."""
    return max(_apart(*pair) for pair in zip(curve, other, strict=True))


def _apart(value: float, other: float) -> float:
    difference = abs(value - other)
    return difference if difference == difference else float("inf")


def _provenance(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine(),
        "versions": installed(_PACKAGES),
        "overrides": ["--config-name=demo", *_JOB, *_DEVICES[device]],
    }


def write(path: Path, device: str) -> None:
    """Run the job twice and keep the first run's curves."""
    curves, again = run_job(device), run_job(device)
    spread = {name: largest_difference(curves[name], again[name]) for name in curves}
    result = {
        "device": device,
        **_provenance(device),
        "spread": spread,
        "tolerance": tolerances(curves, again),
        "curves": curves,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"largest differences between two runs: {spread}")


def check(path: Path) -> int:
    """Run the job of the file and compare; the exit status."""
    golden = json.loads(path.read_text())
    lines = differences(golden["curves"], run_job(golden["device"]), golden["tolerance"])
    print(*lines or [f"all {len(golden['curves'])} curves of {path} are reproduced"], sep="\n")
    return 1 if lines else 0


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", choices=tuple(_DEVICES), default="cpu", help="of write")
    arguments = parser.parse_args()
    if arguments.action == "check":
        return check(arguments.path)
    write(arguments.path, arguments.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
