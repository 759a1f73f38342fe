"""CISPO: clipped weights, and a gradient for every token."""

from math import log

import pytest

from mrl.algorithms.policy_losses.cispo import CISPO

LOSS = CISPO(clip_ratio_low=0.2, clip_ratio_high=0.3)


def test_weights_by_hand(evaluate):
    ratios, advantages = [1.0, 2.0, 0.5, 2.0], [1.0, 1.0, -2.0, -1.0]
    found = evaluate(LOSS, [[log(r) for r in ratios]], [advantages], old=[[-1.0] * 4])
    weights = [1.0, 1.3, 0.8, 1.3]
    log_probs = [-1.0 + log(r) for r in ratios]
    # Clipped or not, a token's gradient is -weight * A.
    assert found.gradient[0] == pytest.approx([-w * a for w, a in zip(weights, advantages, strict=True)])
    assert found.losses[0] == pytest.approx(
        [-w * a * p for w, a, p in zip(weights, advantages, log_probs, strict=True)]
    )
    assert found.fractions == {"clip_fraction": [[False, True, True, True]]}


def test_the_papers_weight_has_no_lower_bound(evaluate):
    found = evaluate(CISPO(clip_ratio_low=1.0, clip_ratio_high=0.3), [[log(0.01)]], [[1.0]])
    assert found.gradient[0] == pytest.approx([-0.01])
