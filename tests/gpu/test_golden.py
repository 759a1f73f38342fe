"""A small job's curves on a GPU are those that were kept for its kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/loss_h200x1.json"
HARDWARE = json.loads(GOLDEN.read_text())["hardware"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: CUDA must not start in this one, which other tests fork."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_twenty_steps_on_a_gpu_reproduce_the_golden_curves() -> None:
    found = run("-c", "import torch; print(torch.cuda.get_device_name(0))").stdout.strip()
    if found != HARDWARE:
        pytest.skip(f"{GOLDEN.name} is from a {HARDWARE}, this is a {found}")
    outcome = run("tools/golden_curve.py", "check", str(GOLDEN))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
