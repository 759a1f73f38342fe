"""The clipped surrogate with dual clip."""

from math import log

import pytest
import torch

from mrl.algorithms.policy_losses.vanilla import Vanilla

LOSS = Vanilla(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0)


def test_every_region_by_hand(evaluate):
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
    ratios, advantages, losses, gradients, clipped, clipped_lower = (
        list(column) for column in zip(*cases, strict=True)
    )
    found = evaluate(LOSS, [[log(ratio) for ratio in ratios]], [advantages])
    assert found.losses[0] == pytest.approx(losses, abs=1e-12)
    assert found.gradient[0] == pytest.approx(gradients, abs=1e-12)
    assert found.ratio[0] == pytest.approx(ratios)
    assert found.fractions == {"clip_fraction": [clipped], "clip_fraction_lower": [clipped_lower]}


def objective_by_the_papers(ratio: float, advantage: float) -> float:
    """Written as the case analysis of both papers' figures: piecewise linear in the ratio."""
    if advantage >= 0:
        return advantage * min(ratio, 1 + LOSS.clip_ratio_high)
    return advantage * min(max(ratio, 1 - LOSS.clip_ratio_low), LOSS.clip_ratio_c)


def test_equals_the_papers_piecewise_form(evaluate):
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(400, generator=generator).clamp(-2, 2).double()
    advantages = torch.randn(400, generator=generator).double()
    found = evaluate(LOSS, [log_ratio.tolist()], [advantages.tolist()])
    pairs = zip(log_ratio.exp().tolist(), advantages.tolist(), strict=True)
    expected = [-objective_by_the_papers(ratio, advantage) for ratio, advantage in pairs]
    assert found.losses[0] == pytest.approx(expected, abs=1e-12)
    assert 0 < sum(found.fractions["clip_fraction_lower"][0]) < sum(found.fractions["clip_fraction"][0]) < 400


def test_on_policy_gradient_is_reinforce(evaluate):
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).tolist()
    assert evaluate(LOSS, [[0.0] * 4] * 3, advantages).gradient == [[-a for a in row] for row in advantages]


def test_runaway_ratios_stay_finite(evaluate):
    found = evaluate(LOSS, [[500.0, -500.0]], [[-1.0, 1.0]])
    assert found.losses == [[3.0, pytest.approx(-2.061e-9, rel=1e-3)]]
    assert found.gradient == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_ratio_low": 1.2}, "clip_ratio_low = 1.2"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high = -0.1"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c = 1.0 must be greater than 1"),
    ],
)
def test_wrong_clip_ratios_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Vanilla(**change)
