"""The lead of a group's best sample."""

import statistics

import pytest
from estimator_cases import assert_per_sample, members, one_token_inputs, random_inputs, totals

from mrl.algorithms.estimators.grpo_passk import GRPOPassK


def test_hand_worked_case():
    # Group 0: 7 leads 3 by 4, standard deviation 3. Group 1: two share the maximum.
    inputs = one_token_inputs([1.0, 7.0, 3.0, 2.0, 2.0, 0.0], [0, 0, 0, 1, 1, 1])
    plain = GRPOPassK(norm_adv_by_std_in_grpo=False)(inputs).advantages[:, 1]
    assert plain.tolist() == [0.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    deviation = statistics.stdev([1.0, 7.0, 3.0])
    scaled = GRPOPassK(norm_adv_by_std_in_grpo=True)(inputs).advantages[:, 1]
    assert scaled.tolist() == pytest.approx([0.0, 4.0 / deviation, 0.0, 0.0, 0.0, 0.0], rel=2e-6)


def test_a_sample_that_is_alone_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.n to at least 2"):
        GRPOPassK(norm_adv_by_std_in_grpo=True)(one_token_inputs([1.0, 2.0, 3.0], [0, 0, 1]))


@pytest.mark.parametrize("by_std", [True, False])
def test_equals_what_leaving_a_sample_out_costs_the_maximum(by_std):
    inputs = random_inputs()
    rewards = totals(inputs)
    expected = []
    for sample in range(len(rewards)):
        group = members(inputs, sample)
        everyone = [rewards[other] for other in group]
        others = [rewards[other] for other in group if other != sample]
        scale = statistics.stdev(everyone) + 1e-6 if by_std else 1.0
        expected.append((max(everyone) - max(others)) / scale)
    assert_per_sample(GRPOPassK(norm_adv_by_std_in_grpo=by_std)(inputs).advantages, expected, inputs)
