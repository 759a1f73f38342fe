"""Every policy loss: verl's numbers, numerical gradients, and that padding, order and splits change nothing."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mrl.algorithms.masking import masked_mean
from mrl.algorithms.objectives import PolicyObjective
from mrl.algorithms.policy_losses import POLICY_LOSSES, PolicyInputs, build_policy_loss
from mrl.types import TrainBatch

VERL = json.loads((Path(__file__).parents[3] / "data" / "verl_0_9_1" / "policy_losses.json").read_text())

# Ranges in which the drawn tokens lie on both sides of every bound.
SETTINGS = {
    "clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5, "tau_pos": 1.0, "tau_neg": 1.05,
    "clip_cov_ratio": 0.2, "clip_cov_lb": -0.5, "clip_cov_ub": 2.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.4,
    "dro_beta": 0.7,
}  # fmt: skip
STOPS_GRADIENT = {"gspo", "cispo", "dppo_tv", "dppo_kl"}
"""Their gradient is not that of their value; their own tests have it by hand."""
NUM_SAMPLES, WIDTH = 8, 7


def verl_batch() -> TrainBatch:
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in VERL["inputs"].items()}
    mask = given["loss_mask"].bool()
    return TrainBatch(
        tokens=torch.arange(mask.numel()).reshape(mask.shape),
        lengths=torch.full(mask.shape[:1], mask.shape[1]),
        loss_mask=mask,
        old_log_probs=given["old_log_probs"],
        advantages=given["advantages"],
        rollout_is_weights=given["weights"],
    )


def name_of(case):
    return "-".join([case["loss_mode"], case["loss_agg_mode"], *(["weighted"] if case["weighted"] else [])])


@pytest.mark.parametrize("case", VERL["cases"], ids=name_of)
def test_loss_gradient_and_metrics_are_verls(case):
    batch = verl_batch()
    if not case["weighted"]:
        batch = batch.with_fields(rollout_is_weights=None)
    log_probs = torch.tensor(VERL["inputs"]["log_probs"], dtype=torch.float64)
    if case["shift"] is not None:
        log_probs = batch.required("old_log_probs") + case["shift"]
    leaf = log_probs.requires_grad_()
    objective = PolicyObjective(
        policy_loss=build_policy_loss(case["loss_mode"], {**SETTINGS, **case["settings"]}),
        loss_agg_mode=case["loss_agg_mode"],
        loss_scale_factor=VERL["inputs"]["loss_scale_factor"],
        monitor_entropy=False,
    )
    loss, metrics = objective.bind(batch)({"log_probs": leaf}, batch)
    loss.backward()
    # verl adds 1e-8 to some denominators.
    assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
    torch.testing.assert_close(leaf.grad, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-7, atol=1e-9)
    for name, value in verl_metrics(case).items():
        assert metrics[f"actor/{name}"].value.item() == pytest.approx(value, abs=1e-6), name


def verl_metrics(case):
    """verl reports zeros where a loss clips nothing, and |log r| as the KL of kl_cov; clip_cov's is the selection."""
    values = {name: value for name, value in case["metrics"].items() if value or name != "clip_fraction_lower"}
    if case["loss_mode"] == "sapo":
        values.pop("clip_fraction")
    if case["loss_mode"] == "kl_cov":
        values["kl"] = -values["kl"]
    if case["loss_mode"] == "clip_cov":
        values["clip_cov_fraction"] = values.pop("clip_fraction")
    return values


def draw_batch(seed: int) -> tuple[TrainBatch, torch.Tensor]:
    """A mini-batch in float64, and log-probs some way from the old ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(NUM_SAMPLES, WIDTH, generator=generator, dtype=torch.float64)

    mask = torch.rand(NUM_SAMPLES, WIDTH, generator=generator) < 0.6
    mask[1], mask[0, 0] = False, True
    old = -draw().abs() - 0.05
    batch = TrainBatch(
        tokens=torch.randint(0, 50, (NUM_SAMPLES, WIDTH), generator=generator),
        lengths=torch.full((NUM_SAMPLES,), WIDTH),
        loss_mask=mask,
        old_log_probs=old,
        advantages=draw(),
    )
    return batch, (old + 0.4 * draw()).clamp(max=-0.01)


def loss_and_gradient(mode, whole, log_probs, parts):
    """Of the micro-batches `parts` (rows of `whole`) together."""
    leaf = log_probs.clone().requires_grad_()
    objective = PolicyObjective(policy_loss=build_policy_loss(mode, SETTINGS), monitor_entropy=False)
    loss_fn = objective.bind(whole)
    total = sum(loss_fn({"log_probs": leaf[part]}, whole.select(part))[0] for part in parts)
    total.backward()
    return total.item(), leaf.grad


def close(found, wanted):
    assert found[0] == pytest.approx(wanted[0], abs=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", POLICY_LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_split_order_or_padding_changes_loss_or_gradient(mode, seed):
    batch, log_probs = draw_batch(seed)
    everything = list(range(NUM_SAMPLES))
    wanted = loss_and_gradient(mode, batch, log_probs, [everything])
    assert wanted[1].abs().sum() > 0
    close(loss_and_gradient(mode, batch, log_probs, [[6, 1], [0], [7, 5, 2], [3, 4]]), wanted)
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(seed))
    loss, gradient = loss_and_gradient(mode, batch.select(order), log_probs[order], [everything])
    close((loss, gradient[order.argsort()]), wanted)
    wide = {name: torch.nn.functional.pad(getattr(batch, name), (0, 3)) for name in
            ("tokens", "loss_mask", "old_log_probs", "advantages")}  # fmt: skip
    loss, gradient = loss_and_gradient(
        mode, batch.with_fields(**wide), torch.nn.functional.pad(log_probs, (0, 3)), [everything]
    )
    assert not gradient[:, WIDTH:].any()
    close((loss, gradient[:, :WIDTH]), wanted)


@pytest.mark.parametrize("mode", [mode for mode in POLICY_LOSSES if mode not in STOPS_GRADIENT])
def test_gradient_is_that_of_the_loss(mode):
    batch, log_probs = draw_batch(2)
    objective = PolicyObjective(policy_loss=build_policy_loss(mode, SETTINGS), monitor_entropy=False)
    loss_fn = objective.bind(batch)
    assert torch.autograd.gradcheck(lambda x: loss_fn({"log_probs": x}, batch)[0], log_probs.requires_grad_())


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_a_mini_batch_without_trained_tokens_has_no_loss(mode):
    batch, log_probs = draw_batch(3)
    batch.loss_mask = torch.zeros_like(batch.loss_mask)
    loss, gradient = loss_and_gradient(mode, batch, log_probs, [[0, 1], [2, 3, 4, 5, 6, 7]])
    assert loss == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(mode):
    """Where the ratio is 1 nothing is clipped: each token's gradient is -A, or its sequence's mean for geo_mean."""
    batch, _ = draw_batch(4)
    leaf = batch.required("old_log_probs").clone().requires_grad_()
    inputs = PolicyInputs(
        tokens=batch.tokens, loss_mask=batch.loss_mask, log_probs=leaf,
        old_log_probs=batch.required("old_log_probs"), advantages=batch.required("advantages"),
    )  # fmt: skip
    terms = build_policy_loss(mode, SETTINGS).bind(batch)(inputs)
    terms.token_loss[batch.loss_mask].sum().backward()
    advantages = inputs.advantages
    if mode == "geo_mean":
        advantages = masked_mean(advantages, batch.loss_mask, dim=1)[:, None].expand_as(advantages)
    selected = terms.fractions.get("clip_cov_fraction", torch.zeros_like(batch.loss_mask))
    # |log r| of kl_cov has the subgradient 0 at 0.
    expected = torch.where(batch.loss_mask & ~selected, -advantages, 0.0)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.ratio, torch.ones_like(terms.ratio))


def test_every_loss_takes_known_settings_and_unknown_names_are_refused():
    assert {item.name for loss in POLICY_LOSSES.values() for item in fields(loss)} == set(SETTINGS)
    with pytest.raises(ValueError, match=r"loss_mode = 'gsp0' is unknown; known: vanilla, gspo"):
        build_policy_loss("gsp0", SETTINGS)
