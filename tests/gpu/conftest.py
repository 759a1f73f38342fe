"""Tests on real GPUs, run by `make test-gpu`: transformer-engine's layers, NCCL, memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before CUDA starts. Float32 is compared with float32: cuBLAS would otherwise round its inputs to TF32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
# Asking the driver for devices would initialise CUDA in the process that ranks are forked from.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

HERE = Path(__file__).parent

pytest.register_assert_rewrite("fault_checks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are; the marker `gpus` says how many, one without it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if HERE not in item.path.parents:
            continue
        marker = item.get_closest_marker("gpus")
        needed = marker.args[0] if marker else 1
        if count < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, there are {count}"))
