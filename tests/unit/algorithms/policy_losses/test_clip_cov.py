"""Clip-Cov: a few high-covariance tokens lose their gradient."""

import pytest
import torch

from mrl.algorithms.policy_losses.clip_cov import ClipCov

# Means 0 and -2: covariances 2, -2, 0.5, -0.5, 0 and (masked) 100.
OLD = [[-1.0, -3.0, -1.5, -2.5, -2.0, 8.0]]
ADVANTAGES = [[2.0, 2.0, 1.0, 1.0, -6.0, 10.0]]
MASK = [[1, 1, 1, 1, 1, 0]]


def test_tokens_by_hand(evaluate):
    loss = ClipCov(clip_cov_ratio=1.0, clip_cov_lb=1.0, clip_cov_ub=5.0)
    found = evaluate(loss, [[0.1] * 6], ADVANTAGES, old=OLD, mask=MASK)
    assert found.fractions["clip_cov_fraction"] == [[True, False, False, False, False, False]]
    assert found.losses[0][0] == 0.0
    ratio = torch.tensor(0.1, dtype=torch.float64).exp().item()
    assert found.gradient[0] == pytest.approx([0.0, -2 * ratio, -ratio, -ratio, 6 * ratio, 0.0])


@pytest.mark.parametrize(("ratio", "count"), [(0.001, 1), (0.39, 1), (0.4, 2), (0.61, 3), (1.0, 3)])
def test_the_number_drawn_is_the_ratio_of_trained_tokens_at_least_one_at_most_the_candidates(evaluate, ratio, count):
    loss = ClipCov(clip_cov_ratio=ratio, clip_cov_lb=-0.1, clip_cov_ub=5.0)
    found = evaluate(loss, [[0.0] * 6], ADVANTAGES, old=OLD, mask=MASK)
    assert sum(found.fractions["clip_cov_fraction"][0]) == count


def test_without_candidates_it_is_the_clipped_surrogate(evaluate):
    loss = ClipCov(clip_cov_lb=50.0, clip_cov_ub=60.0)
    found = evaluate(loss, [[1.0] * 6], ADVANTAGES, old=OLD, mask=MASK)
    assert not any(found.fractions["clip_cov_fraction"][0])
    assert found.losses[0][:5] == pytest.approx([-2.4, -2.4, -1.2, -1.2, 6 * 2.718281828], rel=1e-6)


def test_contradictory_bounds_are_refused():
    with pytest.raises(ValueError, match="clip_cov_lb = 5"):
        ClipCov(clip_cov_lb=5.0, clip_cov_ub=5.0)
