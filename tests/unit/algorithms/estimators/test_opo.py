"""Rewards against a baseline weighted by length."""

import torch
from estimator_cases import assert_per_sample, members, random_inputs, totals

from mrl.algorithms.estimators import AdvantageInputs
from mrl.algorithms.estimators.opo import OPO


def test_hand_worked_case():
    # Lengths 3 and 1, rewards 1 and 5: baseline (3 * 1 + 1 * 5) / 4 = 2. The third sample is alone.
    inputs = AdvantageInputs(
        rewards=torch.tensor([[0.0, 0.0, 1.0], [5.0, 9.0, 9.0], [0.0, 4.0, 9.0]]),
        loss_mask=torch.tensor([[True, True, True], [True, False, False], [True, True, False]]),
        groups=torch.tensor([0, 0, 1]),
    )
    assert OPO()(inputs).advantages.tolist() == [[-1.0, -1.0, -1.0], [3.0, 0.0, 0.0], [4.0, 4.0, 0.0]]


def test_a_group_without_a_trained_token_gets_nothing():
    nothing = torch.zeros(2, 3)
    inputs = AdvantageInputs(rewards=nothing, loss_mask=nothing.bool(), groups=torch.tensor([0, 0]))
    assert OPO()(inputs).advantages.tolist() == nothing.tolist()


def test_equals_the_definition():
    inputs = random_inputs()
    rewards, lengths = totals(inputs), inputs.loss_mask.sum(1).tolist()
    expected = []
    for sample, reward in enumerate(rewards):
        group = members(inputs, sample)
        expected.append(reward - sum(lengths[j] * rewards[j] for j in group) / sum(lengths[j] for j in group))
    assert_per_sample(OPO()(inputs).advantages, expected, inputs)
