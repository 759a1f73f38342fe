"""KL-Cov: a penalty on the tokens of highest covariance."""

from math import exp

import pytest

from mrl.algorithms.policy_losses.kl_cov import KLCov

# Means 0 and -2: covariances 2, -2, 0.5, -0.5, 0 and (masked) 100.
OLD = [[-1.0, -3.0, -1.5, -2.5, -2.0, 8.0]]
ADVANTAGES = [[2.0, 2.0, 1.0, 1.0, -6.0, 10.0]]
MASK = [[1, 1, 1, 1, 1, 0]]


def test_tokens_by_hand(evaluate):
    found = evaluate(KLCov(kl_cov_ratio=0.4, ppo_kl_coef=0.5), [[-0.2] * 6], ADVANTAGES, old=OLD, mask=MASK)
    assert found.fractions["kl_cov_fraction"] == [[True, False, True, False, False, False]]
    ratio = exp(-0.2)
    assert found.losses[0][:4] == pytest.approx([-2 * ratio + 0.1, -2 * ratio, -ratio + 0.1, -ratio])
    # |log r| falls as the log-prob rises towards the old one.
    assert found.gradient[0] == pytest.approx([-2 * ratio - 0.5, -2 * ratio, -ratio - 0.5, -ratio, 6 * ratio, 0.0])


def test_rounding_of_the_log_ratio_is_not_a_drift(evaluate):
    loss = KLCov(kl_cov_ratio=1.0, ppo_kl_coef=0.5)
    found = evaluate(loss, [[1e-6, -1e-6, 2e-4, -2e-4]], [[0.0, 0.0, 0.0, 1e-9]])
    assert found.gradient[0] == pytest.approx([0, 0, 0.5, -0.5], abs=1e-6)


@pytest.mark.parametrize(("ratio", "count"), [(0.001, 1), (0.4, 2), (1.0, 5)])
def test_exactly_the_ratio_is_selected_even_among_equals(evaluate, ratio, count):
    for advantages in (ADVANTAGES, [[1.0] * 6]):  # the second: every covariance is 0
        found = evaluate(KLCov(kl_cov_ratio=ratio), [[0.0] * 6], advantages, old=OLD, mask=MASK)
        assert sum(found.fractions["kl_cov_fraction"][0]) == count


def test_a_mini_batch_without_trained_tokens_selects_none(evaluate):
    found = evaluate(KLCov(), [[0.3]], [[1.0]], mask=[[0]])
    assert found.fractions["kl_cov_fraction"] == [[False]]


def test_a_ratio_above_one_is_refused():
    with pytest.raises(ValueError, match=r"kl_cov_ratio = 1\.5"):
        KLCov(kl_cov_ratio=1.5)
