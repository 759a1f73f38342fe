"""Whitened group-relative rewards."""

import statistics

import pytest
import torch
from estimator_cases import assert_per_sample, members, random_inputs, totals

from mrl.algorithms.estimators import AdvantageInputs
from mrl.algorithms.estimators.reinforce_plus_plus_baseline import ReinforcePlusPlusBaseline


def test_hand_worked_case_weighs_samples_by_their_tokens():
    # Centered rewards 1 on two tokens and -1 on one: mean 1/3, variance (2 * (2/3)^2 + (4/3)^2) / 2 = 4/3.
    inputs = AdvantageInputs(
        rewards=torch.tensor([[0.0, 3.0], [1.0, 9.0]]),
        loss_mask=torch.tensor([[True, True], [True, False]]),
        groups=torch.tensor([5, 5]),
    )
    found = ReinforcePlusPlusBaseline()(inputs).advantages.flatten().tolist()
    assert found == pytest.approx([3**-0.5, 3**-0.5, -2 * 3**-0.5, 0.0], rel=1e-6)


def test_equals_the_definition():
    inputs = random_inputs()
    rewards = totals(inputs)
    centered = [
        reward - statistics.fmean(rewards[other] for other in members(inputs, sample))
        for sample, reward in enumerate(rewards)
    ]
    tokens = [
        value for value, count in zip(centered, inputs.loss_mask.sum(1).tolist(), strict=True) for _ in range(count)
    ]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
    expected = [(value - mean) / deviation for value in centered]
    assert_per_sample(ReinforcePlusPlusBaseline()(inputs).advantages, expected, inputs)
