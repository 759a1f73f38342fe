"""KL estimates, the in-reward penalty and its controllers."""

import json
import math
from pathlib import Path

import pytest
import torch

from mrl.algorithms.kl import (
    KL_KINDS,
    AdaptiveKLController,
    FixedKLController,
    compute_kl,
    compute_mean_kl,
    subtract_kl_,
)

VERL = json.loads((Path(__file__).parents[2] / "data" / "verl_0_9_1" / "kl.json").read_text())
LOG_2 = math.log(2.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Policy twice, and half, as likely as the reference: d = log 2 and -log 2.
        ("kl", [LOG_2, -LOG_2]),
        ("abs", [LOG_2, LOG_2]),
        ("mse", [LOG_2**2 / 2, LOG_2**2 / 2]),
        ("low_var_kl", [0.5 - 1 + LOG_2, 2 - 1 - LOG_2]),
    ],
)
def test_estimates_by_hand(kind: str, expected: list[float]) -> None:
    log_probs = torch.tensor([[math.log(0.5), math.log(0.25)]])
    ref_log_probs = torch.tensor([[math.log(0.25), math.log(0.5)]])
    assert compute_kl(log_probs, ref_log_probs, kind)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_second_names_and_plus_variants_have_the_same_values() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, ref_log_probs = torch.randn(2, 4, 5, generator=generator)
    for one, other in (("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")):
        assert torch.equal(compute_kl(log_probs, ref_log_probs, one), compute_kl(log_probs, ref_log_probs, other))
    for kind in KL_KINDS:
        if not kind.endswith("+"):
            plain, plus = (compute_kl(log_probs, ref_log_probs, name) for name in (kind, f"{kind}+"))
            assert torch.equal(plain, plus)


@pytest.mark.parametrize("case", VERL["cases"], ids=lambda case: case["kind"])
def test_values_and_gradients_are_verls(case) -> None:
    """Also beyond the bounds of k3: log-ratios of 2.9, 29.5 and -40."""
    leaf = torch.tensor(VERL["inputs"]["log_probs"], dtype=torch.float64, requires_grad=True)
    found = compute_kl(leaf, torch.tensor(VERL["inputs"]["ref_log_probs"], dtype=torch.float64), case["kind"])
    found.sum().backward()
    assert found.tolist() == pytest.approx(case["value"], rel=1e-9)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx(case["gradient"], rel=1e-9)


def test_the_adaptive_controller_takes_verls_steps() -> None:
    controller = AdaptiveKLController(0.02, target_kl=0.1, horizon=1000)
    for current_kl, n_steps, kl_coef in VERL["controller"]:
        controller.update(current_kl, n_steps)
        assert controller.kl_coef == pytest.approx(kl_coef, rel=1e-11)


def exact_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ref_logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    # The expectation over the policy's own samples, summed over the whole vocabulary.
    each = compute_kl(logits.log_softmax(-1), ref_logits.log_softmax(-1), kind)
    assert (logits.softmax(-1) * each).sum().item() == pytest.approx(exact_kl(logits, ref_logits).item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["k2", "k1+", "k3+", "abs+", "low_var_kl+"])
def test_expected_gradient_of_k2_and_plus_variants_is_that_of_the_kl(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, ref_logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(exact_kl(leaf, ref_logits), leaf)
    each = compute_kl(leaf.log_softmax(-1), ref_logits.log_softmax(-1), kind)
    (found,) = torch.autograd.grad((logits.softmax(-1) * each).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_expected_gradient_of_k1_vanishes() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, ref_logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    each = compute_kl(leaf.log_softmax(-1), ref_logits.log_softmax(-1), "k1")
    (found,) = torch.autograd.grad((logits.softmax(-1) * each).sum(), leaf)
    assert found.abs().max().item() < 1e-12


def test_k3_is_bounded_and_precise_near_zero() -> None:
    far = compute_kl(torch.tensor([[-100.0, 100.0]]), torch.zeros(1, 2), "k3")
    # exp(100) - 101 is cut to 10; at 100 the difference is clamped to 20: exp(-20) - 1 + 20 is cut to 10, too.
    assert far.tolist() == [[10.0, 10.0]]
    near = compute_kl(torch.tensor([[1e-3]]), torch.zeros(1, 1), "k3").item()
    # exp(-d) - 1 + d = d^2 / 2 - d^3 / 6; the direct formula loses all but two digits in float32.
    assert near == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=2e-4)


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown KL estimate 'full'; choose one of kl, k1, abs"):
        compute_kl(torch.zeros(1, 1), torch.zeros(1, 1), "full")


def test_penalty_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    log_probs = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, -1.0, 9.0], [9.0, 9.0, 9.0]])
    ref_log_probs = torch.tensor([[-2.0, -5.0, 0.0], [-7.0, -1.5, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    kl = subtract_kl_(rewards, log_probs, ref_log_probs, mask, kl_coef=0.5, kind="kl")
    assert rewards.tolist() == [[-0.5, -0.5, 0.0], [0.0, 2.75, 0.0], [0.0, 0.0, 0.0]]
    # Tokens: 1, 3 and 0.5. Samples: (1 + 3) / 2 and 0.5; the third has no trained token and does not count.
    assert kl == (1.5, 1.25)
    assert compute_mean_kl(log_probs, ref_log_probs, mask, "kl") == kl
    assert compute_mean_kl(log_probs, ref_log_probs, torch.zeros_like(mask), "kl") == (0.0, 0.0)


def test_what_lies_outside_the_mask_is_not_in_the_penalty_even_if_it_is_nan() -> None:
    rewards, unknown = torch.ones(1, 3), torch.tensor([[torch.nan, -torch.inf, -1.0]])
    mask = torch.tensor([[False, False, True]])
    kl = subtract_kl_(rewards, unknown, torch.full((1, 3), -3.0), mask, kl_coef=0.25, kind="k1")
    assert rewards.tolist() == [[1.0, 1.0, 0.5]]
    assert kl == (2.0, 2.0)


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=10000)
    controller.update(6.6, n_steps=256)  # error 0.1
    assert controller.kl_coef == pytest.approx(0.2 * (1 + 0.1 * 0.0256))
    controller.update(600.0, n_steps=256)  # error clipped to 0.2
    assert controller.kl_coef == pytest.approx(0.2 * (1 + 0.1 * 0.0256) * (1 + 0.2 * 0.0256))
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=10000)
    controller.update(0.0, n_steps=256)  # error clipped to -0.2
    assert controller.kl_coef == pytest.approx(0.2 * (1 - 0.2 * 0.0256))


def test_adaptive_controller_brings_a_responding_kl_to_its_target() -> None:
    controller = AdaptiveKLController(1e-3, target_kl=0.1, horizon=2000)
    for _ in range(600):
        controller.update(0.002 / controller.kl_coef, n_steps=256)
    assert 0.002 / controller.kl_coef == pytest.approx(0.1, rel=1e-3)


def test_controllers_resume_where_they_were() -> None:
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=1000)
    controller.update(9.0, n_steps=100)
    resumed = AdaptiveKLController(0.2, target_kl=6.0, horizon=1000)
    resumed.load_state_dict(controller.state_dict())
    for each in (controller, resumed):
        each.update(3.0, n_steps=100)
    assert resumed.kl_coef == controller.kl_coef != 0.2
    fixed = FixedKLController(0.3)
    fixed.update(100.0, n_steps=10)
    fixed.load_state_dict(controller.state_dict())
    assert fixed.kl_coef == 0.3
    resumed.load_state_dict(fixed.state_dict())
    assert resumed.kl_coef == controller.kl_coef


def test_controller_refuses_steps_that_would_turn_the_coefficient_negative() -> None:
    with pytest.raises(ValueError, match=r"65536 samples per step with algorithm\.kl_ctrl\.horizon = 10000"):
        AdaptiveKLController(0.2, target_kl=6.0, horizon=10000).update(6.0, n_steps=65536)
    with pytest.raises(ValueError, match="target_kl = 0"):
        AdaptiveKLController(0.2, target_kl=0, horizon=10000)
