"""Group-relative advantages."""

import statistics

import pytest
from estimator_cases import assert_per_sample, members, one_token_inputs, random_inputs, totals

from mrl.algorithms.estimators.grpo import GRPO


def test_hand_worked_case():
    # Group 3: 1, 3, 5 with mean 3 and standard deviation 2. Group 8: equal rewards. Group 9: alone.
    inputs = one_token_inputs([1.0, 0.1, 3.0, 0.1, 5.0, 0.1, 7.0], [3, 8, 3, 8, 3, 8, 9])
    plain = GRPO(norm_adv_by_std_in_grpo=False)(inputs)
    assert plain.advantages[:, 1].tolist() == [-2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 7.0]
    assert plain.advantages[:, 0].count_nonzero() == 0
    scaled = GRPO(norm_adv_by_std_in_grpo=True)(inputs)
    assert scaled.advantages[:, 1].tolist() == pytest.approx([-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 7.0], rel=2e-6)
    assert scaled.advantages[1, 1] == 0.0, "equal rewards, even those that binary fractions miss, give exactly nothing"


@pytest.mark.parametrize("by_std", [True, False])
def test_equals_the_definition(by_std):
    inputs = random_inputs()
    rewards = totals(inputs)
    expected = []
    for sample, reward in enumerate(rewards):
        group = [rewards[other] for other in members(inputs, sample)]
        scale = statistics.stdev(group) + 1e-6 if by_std else 1.0
        expected.append((reward - statistics.fmean(group)) / scale)
    advantages, returns = GRPO(norm_adv_by_std_in_grpo=by_std)(inputs)
    assert_per_sample(advantages, expected, inputs)
    assert_per_sample(returns, expected, inputs)
