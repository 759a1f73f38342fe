"""DPPO: a trust region in probability."""

from math import log

import pytest

from mrl.algorithms.policy_losses.dppo import DPPOKL, DPPOTV

PAIRS = [  # old and new probability of a token
    (0.5, 0.65),  # up by 0.15
    (0.5, 0.35),  # down by 0.15
    (0.01, 0.05),  # up by 0.04: a ratio of 5
    (0.01, 0.002),  # down by 0.008: a ratio of 0.2
]
OLD = [[log(old) for old, _ in PAIRS]]
DRIFT = [[log(new / old) for old, new in PAIRS]]


def bernoulli_kl(old: float, new: float) -> float:
    return old * log(old / new) + (1 - old) * log((1 - old) / (1 - new))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_total_variation_by_hand(evaluate, advantage):
    loss = DPPOTV(clip_ratio_low=0.1, clip_ratio_high=0.1, clip_ratio_c=3.0)
    found = evaluate(loss, DRIFT, [[advantage] * 4], old=OLD)
    outside = [True, False, False, False] if advantage > 0 else [False, True, False, False]
    weights = [1.3, 0.7, 3.0, 0.2]  # the third is truncated
    assert found.fractions == {"clip_fraction": [outside], "clip_fraction_lower": [[False, False, True, False]]}
    expected = [0.0 if out else -advantage * w for w, out in zip(weights, outside, strict=True)]
    assert found.gradient[0] == pytest.approx(expected)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_kl_by_hand(evaluate, advantage):
    found = evaluate(DPPOKL(clip_ratio_low=0.01, clip_ratio_high=0.02), DRIFT, [[advantage] * 4], old=OLD)
    bound, moved_further = (0.02, [True, False, True, False]) if advantage > 0 else (0.01, [False, True, False, True])
    outside = [further and bernoulli_kl(*pair) > bound for further, pair in zip(moved_further, PAIRS, strict=True)]
    # KLs 0.047, 0.047, 0.025 and 0.008: a small token's ratio may fall by five.
    assert outside == ([True, False, True, False] if advantage > 0 else [False, True, False, False])
    assert found.fractions["clip_fraction"] == [outside]


def test_wrong_ranges_are_refused():
    with pytest.raises(ValueError, match="clip_ratio_c = 1"):
        DPPOTV(clip_ratio_c=1.0)
