"""Which implementation works on which logits, and the fused one's tests where there is no GPU."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mrl.ops import vocab_reference, vocab_statistics

REPOSITORY = Path(__file__).parents[3]


def test_the_kernels_pass_their_tests_in_tritons_interpreter():
    tests = Path(__file__).with_name("test_vocab_fused.py")
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests), "--no-header", "-v"]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    # All but the test of 64-bit addresses.
    assert re.search(r" [2-9]\d passed, 1 skipped", result.stdout), result.stdout[-2000:]


def test_cpu_tensors_go_to_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert vocab_statistics.implementation(torch.zeros(2, 3)) is vocab_reference


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).t()], ids=["float64", "columns apart"]
)
def test_the_kernels_are_not_given_what_they_cannot_take(monkeypatch, logits):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert vocab_statistics.implementation(logits) is vocab_reference


def test_missing_triton_is_said_once(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mrl.ops.vocab_fused", raising=False)
    vocab_statistics._fused.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert vocab_statistics.implementation(torch.zeros(2, 3)) is vocab_reference
    finally:
        vocab_statistics._fused.cache_clear()
    assert [record.message for record in caplog.records if "Triton cannot be imported" in record.message] == [
        caplog.records[0].message
    ]
