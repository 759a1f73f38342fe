"""Leave-one-out advantages."""

import statistics

from estimator_cases import assert_per_sample, members, one_token_inputs, random_inputs, totals

from mrl.algorithms.estimators.rloo import RLOO


def test_hand_worked_case():
    # Group 0: 1 against the mean of 0 and 4, 0 against that of 1 and 4, 4 against that of 1 and 0. Group 1: alone.
    inputs = one_token_inputs([1.0, 0.0, 2.0, 4.0], [0, 0, 1, 0])
    assert RLOO()(inputs).advantages[:, 1].tolist() == [-1.0, -2.5, 2.0, 3.5]


def test_equals_the_definition():
    inputs = random_inputs()
    rewards = totals(inputs)
    expected = [
        reward - statistics.fmean(rewards[other] for other in members(inputs, sample) if other != sample)
        for sample, reward in enumerate(rewards)
    ]
    assert_per_sample(RLOO()(inputs).advantages, expected, inputs)
