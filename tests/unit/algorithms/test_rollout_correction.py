"""Weights, rejection and mismatch: by hand, against slow loops and verl's numbers."""

import json
from math import exp, log
from pathlib import Path

import pytest
import torch

from mrl.algorithms.objectives import PolicyObjective
from mrl.algorithms.policy_losses.gpg import GPG
from mrl.algorithms.policy_losses.vanilla import Vanilla
from mrl.algorithms.rollout_correction import (
    Rejection,
    RolloutCorrection,
    Weighting,
    compute_accepted,
    compute_mismatch,
    compute_weights,
    correction_metrics,
)
from mrl.config.rollout_correction import REJECTIONS, RolloutCorrectionConfig
from mrl.trainer.settings import rollout_correction
from mrl.types import TrainBatch

VERL = json.loads((Path(__file__).parents[2] / "data" / "verl_0_9_1" / "rollout_correction.json").read_text())
INPUTS = {name: torch.tensor(value, dtype=torch.float64) for name, value in VERL["inputs"].items()}
MASK = INPUTS["loss_mask"].bool()

# Ratios trainer / rollout 2, 1/4, (masked) 100 and 3, 1/2, 1.
LOG_RATIO = torch.tensor([[2.0, 0.25, 100.0], [3.0, 0.5, 1.0]], dtype=torch.float64).log()
TRAINED = torch.tensor([[True, True, False], [True, True, True]])


def weights_of(**settings):
    return compute_weights(LOG_RATIO, TRAINED, Weighting(**settings)).tolist()


def test_weights_by_hand():
    assert weights_of(level="token", upper=2.5) == [pytest.approx([2, 0.25, 0]), pytest.approx([2.5, 0.5, 1])]
    # Products 1/2 and 3/2.
    assert weights_of(level="sequence", upper=1.2) == [pytest.approx([0.5, 0.5, 0]), pytest.approx([1.2] * 3)]
    assert weights_of(level="token", lower=0.5, upper=2.5)[0] == pytest.approx([2, 0, 0])
    assert weights_of(level="token", lower=0.5 - 1e-9, upper=2.5)[1] == pytest.approx([0, 0.5, 1])
    assert weights_of(level="sequence", lower=0.6, upper=1.6) == [[0, 0, 0], pytest.approx([1.5] * 3)]


def test_normalized_weights_have_mean_one_over_tokens_or_sequences():
    token = torch.tensor(weights_of(level="token", upper=2.5, batch_normalize=True))
    assert float(token[TRAINED].mean()) == pytest.approx(1)
    # Means over sequences, not tokens: (0.5 + 1.5) / 2 = 1, so that nothing changes.
    plain, normalized = (weights_of(level="sequence", upper=2, batch_normalize=flag) for flag in (False, True))
    assert normalized == [pytest.approx(row) for row in plain]


def accepted_by(scope, divergence, upper, lower=None):
    rule = Rejection(scope=scope, divergence=divergence, upper=upper, lower=lower)
    return compute_accepted(LOG_RATIO, TRAINED, [rule])


def test_rejection_by_hand():
    # k1 bounds are of rollout / trainer: 1/2, 4 and 1/3, 2, 1.
    assert accepted_by("token", "k1", 2.5, 0.4)[TRAINED].tolist() == [True, False, False, True, True]
    # Products 2 and 2/3; geometric means 1.41 and 0.87.
    assert accepted_by("seq_sum", "k1", 1.9, 0.5).tolist() == [[False] * 3, [True] * 3]
    assert accepted_by("seq_mean", "k1", 1.5, 0.9).tolist() == [[True] * 3, [False] * 3]
    # k2 of the tokens: 0.24, 0.96 and 0.60, 0.24, 0.
    assert accepted_by("seq_max", "k2", 0.7).tolist() == [[False] * 3, [True] * 3]
    assert accepted_by("seq_sum", "k2", 0.84).tolist() == [[False] * 3, [False] * 3]
    assert accepted_by("seq_mean", "k2", 0.4).tolist() == [[False] * 3, [True] * 3]
    # k3: 1 - log 2, -3/4 + log 4 and 2 - log 3, -1/2 + log 2, 0.
    assert accepted_by("token", "k3", 0.64)[TRAINED].tolist() == [True, True, False, True, True]


def test_every_test_must_pass():
    rules = [
        Rejection(scope="token", divergence="k1", upper=2.5, lower=0.4),
        Rejection(scope="seq_mean", divergence="k1", upper=1.5, lower=0.9),
    ]
    assert compute_accepted(LOG_RATIO, TRAINED, rules)[TRAINED].tolist() == [True, False, False, False, False]


def slow_statistic(scope, divergence, row, mask):
    token = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: exp(d) - 1 - d}[divergence]
    values = [token(d) for d, kept in zip(row, mask, strict=True) if kept]
    if scope == "token":
        return [token(d) for d in row]
    total = {"seq_sum": sum(values), "seq_mean": sum(values) / max(len(values), 1), "seq_max": max(values, default=0.0)}
    return [total[scope]] * len(row)


@pytest.mark.parametrize("name", REJECTIONS)
def test_rejection_equals_a_slow_loop(name):
    generator = torch.Generator().manual_seed(len(name))
    log_ratio = torch.randn(30, 6, generator=generator, dtype=torch.float64) / 3
    mask = torch.rand(30, 6, generator=generator) < 0.7
    scope, _, divergence = name.rpartition("_")
    values = [slow_statistic(scope, divergence, *pair) for pair in zip(log_ratio.tolist(), mask.tolist(), strict=True)]
    upper = sorted(value for row in values for value in row)[120]
    lower = -upper if divergence == "k1" else None
    rule = Rejection(
        scope=scope, divergence=divergence, upper=exp(upper) if lower else upper, lower=exp(lower) if lower else None
    )
    found = compute_accepted(log_ratio, mask, [rule])
    floor = -1.0 if lower is None else lower
    # The bound itself is one of the values: rounding may put it on either side.
    clear = torch.tensor([[abs(value - upper) > 1e-9 for value in row] for row in values])
    wanted = torch.tensor([[floor <= value <= upper for value in row] for row in values])
    assert torch.equal(found & clear, wanted & clear)
    assert 0 < int(found[mask].sum()) < int(mask.sum())


def mismatch(log_ratio, mask, ratio_bounds):
    rollout_log_probs = torch.full_like(log_ratio, -1.0)
    return compute_mismatch(log_ratio + rollout_log_probs, rollout_log_probs, mask, ratio_bounds)


def test_mismatch_by_hand():
    found = mismatch(LOG_RATIO, TRAINED, (0.3, 2.5))
    ratios = [2, 0.25, 3, 0.5, 1]
    logs = [log(ratio) for ratio in ratios]
    assert found == pytest.approx(
        {
            "log_prob_abs_diff_mean": sum(abs(d) for d in logs) / 5,
            "log_prob_abs_diff_max": log(4),
            "kl_k1": -sum(logs) / 5,
            "kl_k3": sum(r - 1 - log(r) for r in ratios) / 5,
            "outside_fraction": 2 / 5,
            "effective_sample_size": sum(ratios) ** 2 / (5 * sum(r * r for r in ratios)),
        }
    )


def test_equal_log_probs_are_perfect_and_an_empty_batch_has_no_mismatch():
    perfect = mismatch(torch.zeros(2, 3), TRAINED, (0.5, 2.0))
    assert perfect.pop("effective_sample_size") == 1.0
    assert set(perfect.values()) == {0.0}
    assert set(mismatch(LOG_RATIO, torch.zeros_like(TRAINED), (0.5, 2.0)).values()) == {0.0}


@pytest.mark.parametrize("difference", [1e-6, 1e-3, 0.1, 3.0])
def test_mismatch_of_any_size_keeps_its_digits(difference):
    generator = torch.Generator().manual_seed(0)
    rollout_log_probs = -torch.rand(300, 401, generator=generator)
    log_probs = rollout_log_probs + difference * torch.randn(300, 401, generator=generator)
    mask = torch.rand(300, 401, generator=generator) < 0.6
    found = compute_mismatch(log_probs, rollout_log_probs, mask, (0.5, 2.0))
    exact = (log_probs - rollout_log_probs)[mask].double()
    ratio = exact.exp()
    assert found["kl_k3"] == pytest.approx(
        (torch.expm1(exact) - exact).mean().item(), rel=1e-3 if difference < 1e-5 else 1e-9
    )
    assert found["kl_k1"] == pytest.approx(-exact.mean().item(), rel=1e-9)
    assert found["outside_fraction"] == ((ratio < 0.5) | (ratio > 2.0)).double().mean().item()
    assert found["log_prob_abs_diff_max"] == exact.abs().max().item()
    wanted = (ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())).item()
    assert found["effective_sample_size"] == pytest.approx(wanted, rel=1e-9)


def test_mismatch_ignores_even_nan_outside_the_mask():
    unknown = torch.where(TRAINED, LOG_RATIO, torch.nan)
    assert mismatch(unknown, TRAINED, (0.5, 2.0)) == mismatch(LOG_RATIO, TRAINED, (0.5, 2.0))


def test_runaway_ratios_stay_finite():
    log_ratio = torch.tensor([[500.0, -500.0]])
    mask = torch.ones_like(log_ratio).bool()
    for level in ("token", "sequence"):
        assert compute_weights(log_ratio, mask, Weighting(level=level, upper=2.0)).isfinite().all()
    assert all(abs(value) < 1e10 for value in mismatch(log_ratio, mask, (0.5, 2.0)).values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_order_and_split_change_no_weight(level):
    rule = Rejection(scope="seq_mean", divergence="k1", upper=1.5, lower=0.9)
    correction = RolloutCorrection(weighting=Weighting(level=level, upper=1.2), rejections=(rule,))
    whole = correction.compute(LOG_RATIO, TRAINED)
    for row in (0, 1):
        alone = correction.compute(
            torch.nn.functional.pad(LOG_RATIO[[row]], (0, 2), value=9.0),
            torch.nn.functional.pad(TRAINED[[row]], (0, 2)),
        )
        for part, of_whole in zip(alone, whole, strict=True):
            assert torch.equal(part[:, :3], of_whole[[row]])


def name_of(case):
    return "-".join(str(value) for value in case["settings"].values())


@pytest.mark.parametrize("case", VERL["cases"], ids=name_of)
def test_weights_masks_and_metrics_are_verls(case):
    correction = rollout_correction(RolloutCorrectionConfig(**case["settings"]))
    log_ratio = INPUTS["old_log_probs"] - INPUTS["rollout_log_probs"]
    result = correction.compute(log_ratio, MASK)
    if case["weights"] is None:
        assert result.weights is None
    else:
        wanted = torch.tensor(case["weights"], dtype=torch.float64)
        # verl adds 1e-8 to the number of tokens that a mean divides by.
        torch.testing.assert_close(result.weights, wanted, rtol=1e-7, atol=0)
    kept = MASK if result.accepted is None else MASK & result.accepted
    assert kept.long().tolist() == case["mask"]
    metrics = correction_metrics(correction, log_ratio, MASK, result)
    log_probs = INPUTS["old_log_probs"], INPUTS["rollout_log_probs"]
    metrics |= compute_mismatch(*log_probs, MASK, correction.ratio_bounds)
    for name, value in verl_metrics(case).items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def verl_metrics(case):
    """Ours go by these names, and a sequence's largest and smallest weight are bounded here and raw there."""
    renamed = {"kl": "kl_k1", "k3_kl": "kl_k3"}
    values = {renamed.get(name, name): value for name, value in case["metrics"].items()}
    left_out = {"rollout_is_std", "rollout_is_oob_ratio", "chi2_token"}
    if case["settings"].get("rollout_is") == "sequence":
        left_out |= {"rollout_is_max", "rollout_is_min"}
    return {name: value for name, value in values.items() if name not in left_out}


@pytest.mark.parametrize("case", VERL["bypass"], ids=lambda case: f"{case['loss_type']}-{name_of(case)}")
def test_bypass_loss_and_gradient_are_verls_in_any_split(case):
    settings = RolloutCorrectionConfig(**case["settings"], bypass_mode=True, loss_type=case["loss_type"])
    batch = TrainBatch(
        tokens=torch.zeros_like(MASK).long(),
        lengths=torch.full(MASK.shape[:1], MASK.shape[1]),
        loss_mask=MASK,
        rollout_log_probs=INPUTS["rollout_log_probs"],
        old_log_probs=INPUTS["rollout_log_probs"],
        advantages=INPUTS["advantages"],
    )
    clipped = Vanilla(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=1.5)
    objective = PolicyObjective(
        policy_loss=clipped if case["loss_type"] == "ppo_clip" else GPG(),
        correction=rollout_correction(settings),
        monitor_entropy=False,
    )
    loss_fn = objective.bind(batch)
    for parts in ([[0, 1, 2, 3]], [[2], [3, 0], [1]]):
        leaf = INPUTS["log_probs"].clone().requires_grad_()
        shares = [loss_fn({"log_probs": leaf[part]}, batch.select(part)) for part in parts]
        loss = sum(share[0] for share in shares)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
        wanted = torch.tensor(case["gradient"], dtype=torch.float64)
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-7, atol=1e-9)
        rejected = sum(share[1]["actor/rollout_rs_masked_fraction"].value.item() for share in shares)
        assert rejected == pytest.approx(case["masked_fraction"], abs=1e-6)


def test_a_k1_test_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match="k1 needs a lower bound"):
        Rejection(scope="token", divergence="k1", upper=2.0)
