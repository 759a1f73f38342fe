"""transformer-engine's layers against transformers: log-probs, updates, weights; every family, one GPU and two."""

from __future__ import annotations

import io
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="transformer-engine is not installed")

# Float32 through other kernels: log-probs of magnitude 6, gradient norms of 1, two Adam steps of up to 3e-3.
LOG_PROB_TOLERANCE = 5e-5
METRIC_TOLERANCE = 2e-4
WEIGHT_TOLERANCE = 2e-4
# Bfloat16 through four layers.
BF16_MEAN_TOLERANCE = 0.03

Models = dict[str, str]
References = dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, References]:
    return on_ranks("prepare", tmp_path_factory.mktemp("families"), world_size=1, on_gpus=False)


def on_ranks(function: str, argument: Any, *, world_size: int, on_gpus: bool = True) -> Any:
    """What rank 0 returns. The module is imported there: it starts CUDA, after which nothing can be forked.

    Plainly pickled tensors would import megatron-core here: it replaces what rebuilds them.
    """

    def run() -> bytes:
        buffer = io.BytesIO()
        torch.save(getattr(import_module("te_cases"), function)(argument), buffer)
        return buffer.getvalue()

    return torch.load(io.BytesIO(run_on_ranks(run, world_size, on_gpus=on_gpus)[0]))


def check_against(reference: tuple[Any, ...], result: tuple[Any, ...], case: str) -> None:
    (ref_log_probs, ref_log, ref_weights), (log_probs, log, weights) = reference, result
    torch.testing.assert_close(log_probs, ref_log_probs, atol=LOG_PROB_TOLERANCE, rtol=0, msg=lambda m: f"{case}: {m}")
    for step, (ours, theirs) in enumerate(zip(log, ref_log, strict=True)):
        for name, expected in theirs.items():
            assert ours[name] == pytest.approx(expected, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), (case, step, name)
    assert weights.keys() == ref_weights.keys(), case
    for name, tensor in weights.items():
        difference = (tensor - ref_weights[name]).abs().max().item()
        assert difference <= WEIGHT_TOLERANCE, (case, name, difference)


def assert_near(log_probs: Tensor, expected: Tensor, case: str) -> None:
    assert torch.isfinite(log_probs).all(), case
    difference = (log_probs - expected)[expected != 0].abs().mean().item()
    assert difference < BF16_MEAN_TOLERANCE, (case, difference)


def check_all(references: References, trained: dict[str, Any], log_probs: dict[str, Tensor]) -> None:
    assert trained
    assert log_probs
    for case, result in trained.items():
        check_against(references[case.split(", ")[0]], result, case)
    for family, found in log_probs.items():
        assert_near(found, references[family][0], family)


def test_one_gpu_computes_what_transformers_does(prepared) -> None:
    models, references = prepared
    check_all(references, *on_ranks("run_on_one", models, world_size=1))


@pytest.mark.gpus(2)
def test_two_gpus_compute_what_transformers_does(prepared) -> None:
    models, references = prepared
    check_all(references, *on_ranks("run_on_two", models, world_size=2))
