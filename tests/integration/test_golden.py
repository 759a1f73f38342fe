"""A small job's curves are those that were kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_jobs import run_command
from golden_curve import differences, job_arguments, read_curves

pytestmark = pytest.mark.e2e

GOLDEN = Path(__file__).parents[1] / "golden/loss_cpu.json"


def test_twenty_steps_on_a_cpu_reproduce_the_golden_curves(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    outcome = run_command(job_arguments("cpu", tmp_path / "run"), tmp_path)
    assert outcome.status == 0, outcome.output
    assert differences(golden["curves"], read_curves(tmp_path / "run"), golden["tolerance"]) == []
