"""The clipped surrogate with dual clip."""

import math

import pytest
import torch

from mrl.algorithms.policy_loss import PolicyLoss, compute_policy_loss

CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0}


def loss_of(ratios: list[float], advantages: list[float]) -> tuple[PolicyLoss, list[float]]:
    """Loss at the given ratios, and the gradient with respect to the log-probs."""
    leaf = torch.tensor([ratios]).log().requires_grad_()
    result = compute_policy_loss(leaf, torch.zeros_like(leaf), torch.tensor([advantages]), **CLIPS)
    (gradient,) = torch.autograd.grad(result.token_loss.sum(), leaf)
    return result, gradient[0].tolist()


def test_every_region_by_hand() -> None:
    cases = [
        # ratio, advantage, loss, gradient by log-prob (-A r, or 0 where clipped), clipped, clipped_lower
        (1.0, 2.0, -2.0, -2.0, False, False),
        (1.5, 2.0, -2.6, 0.0, True, False),  # above 1 + high: 1.3 * 2
        (0.5, 2.0, -1.0, -1.0, False, False),  # the pessimistic side is not clipped
        (0.5, -2.0, 1.6, 0.0, True, False),  # below 1 - low: 0.8 * 2
        (1.5, -2.0, 3.0, 3.0, False, False),
        (4.0, -2.0, 6.0, 0.0, False, True),  # dual clip: 3 * 2
        (4.0, 0.0, 0.0, 0.0, False, False),
    ]
    columns = [list(column) for column in zip(*cases, strict=True)]
    ratios, advantages, losses, gradients, clipped, clipped_lower = columns
    result, found = loss_of(ratios, advantages)
    assert result.token_loss[0].tolist() == pytest.approx(losses, abs=1e-5)
    assert found == pytest.approx(gradients, abs=1e-5)
    assert result.clipped[0].tolist() == clipped
    assert result.clipped_lower[0].tolist() == clipped_lower
    assert result.ratio[0].tolist() == pytest.approx(ratios, rel=1e-6)
    assert result.approx_kl[0].tolist() == pytest.approx([-math.log(ratio) for ratio in ratios], abs=1e-6)


def objective_by_the_papers(ratio: float, advantage: float) -> float:
    """Written as the case analysis of both papers' figures: piecewise linear in the ratio."""
    if advantage >= 0:
        return advantage * min(ratio, 1 + CLIPS["clip_ratio_high"])
    return advantage * min(max(ratio, 1 - CLIPS["clip_ratio_low"]), CLIPS["clip_ratio_c"])


def test_equals_the_papers_piecewise_form() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(400, generator=generator).clamp(-2, 2).double()
    advantages = torch.randn(400, generator=generator).double()
    result = compute_policy_loss(log_ratio[None], torch.zeros(1, 400).double(), advantages[None], **CLIPS)
    pairs = zip(log_ratio.exp().tolist(), advantages.tolist(), strict=True)
    expected = [-objective_by_the_papers(ratio, advantage) for ratio, advantage in pairs]
    assert result.token_loss[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert 0 < result.clipped_lower.sum() < result.clipped.sum() < 400


def test_on_policy_gradient_is_reinforce() -> None:
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(3, 4, generator=generator).requires_grad_()
    advantages = torch.randn(3, 4, generator=generator)
    compute_policy_loss(leaf, leaf.detach(), advantages, **CLIPS).token_loss.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, -advantages)


def test_runaway_ratios_stay_finite() -> None:
    leaf = torch.tensor([[500.0, -500.0]]).requires_grad_()
    result = compute_policy_loss(leaf, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), **CLIPS)
    result.token_loss.sum().backward()
    assert result.token_loss.detach().tolist() == [[3.0, pytest.approx(-math.exp(-20))]]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_ratio_low": 1.2}, "clip_ratio_low = 1.2"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high = -0.1"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c = 1.0 must be greater than 1"),
    ],
)
def test_wrong_clip_ratios_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), **{**CLIPS, **change})
