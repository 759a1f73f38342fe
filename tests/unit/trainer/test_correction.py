"""The correction stage, and what the actor's objective makes of its results."""

from dataclasses import replace

import pytest
import torch

from mrl.algorithms.objectives import PolicyObjective
from mrl.algorithms.rollout_correction import Rejection, RolloutCorrection, Weighting
from mrl.trainer.correction import CorrectionStage
from mrl.types import TrainBatch

FULL = RolloutCorrection(
    weighting=Weighting(level="token", upper=1.5),
    rejections=(Rejection(scope="seq_mean", divergence="k1", upper=1.5, lower=0.6),),
)


def make_batch() -> TrainBatch:
    """Ratios trainer / rollout: 1.9, 1 in the first sequence, kept; 1, 1/4 in the second, rejected."""
    return TrainBatch(
        tokens=torch.zeros(2, 3, dtype=torch.long),
        lengths=torch.tensor([3, 3]),
        loss_mask=torch.tensor([[False, True, True], [False, True, True]]),
        old_log_probs=torch.tensor([[0.0, 1.9, 1.0], [0.0, 1.0, 0.25]]).clamp(min=0.1).log(),
        rollout_log_probs=torch.zeros(2, 3),
        advantages=torch.tensor([[0.0, 3.0, 1.0], [0.0, 5.0, 7.0]]),
    )


def test_by_default_the_mismatch_is_reported_and_nothing_corrected():
    batch, metrics = CorrectionStage().compute(make_batch())
    assert batch.rollout_is_weights is None
    assert batch.accepted is None
    assert sorted(metrics) == [
        "parity/effective_sample_size",
        "parity/kl_k1",
        "parity/kl_k3",
        "parity/log_prob_abs_diff_max",
        "parity/log_prob_abs_diff_mean",
        "parity/outside_fraction",
    ]
    assert metrics["parity/outside_fraction"] == 0.25


def test_rejected_tokens_leave_the_actors_loss_and_its_denominators_alone():
    batch, metrics = CorrectionStage(correction=FULL).compute(make_batch())
    assert torch.equal(batch.loss_mask, make_batch().loss_mask), "advantages and the critic see every token"
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 0.5
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx((1.5 + 1 + 1 + 0.25) / 4)
    leaf = batch.required("old_log_probs").clone().requires_grad_()
    loss, _ = PolicyObjective(monitor_entropy=False).bind(batch)({"log_probs": leaf}, batch)
    loss.backward()
    # Two tokens are left: (1.5 * 3 + 1 * 1) / 2.
    assert loss.item() == pytest.approx(-2.75)
    assert leaf.grad.tolist() == [pytest.approx([0, -2.25, -0.5]), [0, 0, 0]]


def test_weights_do_not_touch_entropy_and_kl_terms():
    batch, _ = CorrectionStage(correction=FULL).compute(make_batch())
    batch = batch.with_fields(ref_log_probs=torch.zeros(2, 3), advantages=torch.zeros(2, 3))
    output = {"log_probs": batch.required("old_log_probs"), "entropy": torch.tensor([[9.0, 1.0, 3.0], [9.0, 9.0, 9.0]])}
    objective = PolicyObjective(entropy_coeff=1.0, use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type="k1")
    loss, _ = objective.bind(batch)(output, batch)
    kl = (torch.tensor(1.9).log() + 0) / 2
    assert loss.item() == pytest.approx(-2.0 + kl.item())


def test_bypass_mode_leaves_the_correction_to_the_objective():
    batch, metrics = CorrectionStage(correction=FULL, bypass_mode=True).compute(make_batch())
    assert metrics == {}
    assert batch.accepted is None
    now = batch.required("old_log_probs")
    batch = batch.with_fields(old_log_probs=batch.rollout_log_probs)
    objective = PolicyObjective(correction=replace(FULL, weighting=None), monitor_entropy=False)
    loss, metrics = objective.bind(batch)({"log_probs": now}, batch)
    # The first sequence's ratios 1.9 (clipped to 1.2) and 1; the second is rejected, but counts in the mean over 4.
    assert loss.item() == pytest.approx(-(1.2 * 3 + 1) / 4)
    assert metrics["actor/rollout_rs_masked_fraction"].value.item() == 0.5
    assert metrics["actor/ratio_mean"].value.item() == pytest.approx((1.9 + 1 + 1 + 0.25) / 4)
    assert metrics["actor/rollout_outside_fraction"].value.item() == 0.25
