"""What a traced step leaves on a GPU. In a process of its own: this one must not start CUDA."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
import torch
from mrl.observability.profiler import StepProfiler, phase_range
matrix = torch.ones(512, 512, device="cuda")
with StepProfiler([1], folder=Path(sys.argv[1]), rank=0, device="cuda")(1), phase_range("rollout"):
    product = matrix @ matrix
"""


def test_a_traced_step_has_kernels_its_phase_and_the_memory_they_took(tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, timeout=300)
    with gzip.open(tmp_path / "step_1_rank_0.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert any(event["name"] == "phase/rollout" for event in events)
    with open(tmp_path / "step_1_rank_0.memory.pickle", "rb") as file:
        snapshot = pickle.load(file)
    sizes = [entry["size"] for trace in snapshot["device_traces"] for entry in trace if entry["action"] == "alloc"]
    assert 512 * 512 * 4 in sizes
