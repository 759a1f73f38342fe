"""Two training steps in any layout, and the same by transformers and torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hugging_face import checkpoint_state
from megatron_reference import OPTIMIZER, TEMPERATURE, Reference, gather_hf_tensors, policy_loss

from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit, TrainBatch

PAIRS = MicroBatchLimit(samples=2)

# Log-probs of magnitude 6, losses of 1, gradient norms of 1: float32 rounding through 4 or 8 layers.
LOG_PROB_TOLERANCE = 1e-5
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 2e-5
# Two Adam steps move a weight by 1e-2; the layouts' and AdamW's weights differ by rounding of the gradients.
WEIGHT_TOLERANCE = 2e-5


def run_reference(reference: Reference, batches: list[TrainBatch]) -> tuple[Any, ...]:
    """Log-probs of the first batch, the log of a step with each, and the weights after them, by transformers."""
    with torch.no_grad():
        log_probs = reference.outputs(batches[0])["log_probs"]
    log = reference.train(batches, policy_loss)
    return log_probs, log, checkpoint_state(reference.model)


def run_case(path: str, batches: list[TrainBatch], layout: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """The same on the ranks that call this.

    Args:
        options: of the role's setup; `limit` is that of its micro-batches.
    """
    options = dict(options)
    limit = options.pop("limit", PAIRS)
    spec = load_spec(path)
    engine = build_engine(
        RoleSetup(
            kind="actor",
            model_path=path,
            spec=spec,
            layout=ParallelLayout(world_size=dist.get_world_size(), **layout),
            temperature=TEMPERATURE,
            optimizer=OPTIMIZER,
            **options,
        )
    )
    log_probs = engine.compute_log_probs(batches[0], limit=limit)
    first = engine.export_weights()
    log = [engine.update(batch, policy_loss(batch), limit=limit, with_entropy=True) for batch in batches]
    assert engine.export_weights() == first
    weights = gather_hf_tensors(engine, spec)
    engine.close()
    return log_probs, log, weights


def check_against(reference: tuple[Any, ...], result: tuple[Any, ...], case: str) -> None:
    """Raise AssertionError unless a result of `run_case` is that of `run_reference` within rounding."""
    (ref_log_probs, ref_log, ref_weights), (log_probs, log, weights) = reference, result
    torch.testing.assert_close(log_probs, ref_log_probs, atol=LOG_PROB_TOLERANCE, rtol=0, msg=lambda m: f"{case}: {m}")
    for step, (ours, theirs) in enumerate(zip(log, ref_log, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            tolerance = LOSS_TOLERANCE if name in ("loss", "lr") else NORM_TOLERANCE
            assert ours[name] == pytest.approx(expected, rel=tolerance, abs=tolerance), (case, step, name)
    for name, tensor in weights.items():
        difference = (tensor - ref_weights[name]).abs().max().item()
        assert difference <= WEIGHT_TOLERANCE, (case, name, difference)
