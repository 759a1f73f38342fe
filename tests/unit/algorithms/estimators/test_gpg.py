"""Group-relative advantages scaled by the share of samples that earn nothing."""

import statistics
from dataclasses import replace

import torch
from estimator_cases import assert_per_sample, members, one_token_inputs, random_inputs, totals

from mrl.algorithms.estimators.gpg import GPG


def test_hand_worked_case():
    # Three of six rewards are not 0, so alpha is 2.
    inputs = one_token_inputs([1.0, 0.0, 3.0, 4.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2])
    assert GPG()(inputs).advantages[:, 1].tolist() == [1.0, -1.0, -1.0, 1.0, 0.0, 0.0]


def test_a_batch_that_earns_nothing_gets_nothing():
    assert GPG()(one_token_inputs([0.0, 0.0], [0, 0])).advantages.tolist() == [[0.0, 0.0]] * 2


def test_equals_the_definition():
    inputs = random_inputs()
    inputs = replace(inputs, rewards=torch.where((inputs.groups == 0)[:, None], 0.0, inputs.rewards))
    rewards = totals(inputs)
    alpha = len(rewards) / sum(reward != 0 for reward in rewards)
    assert alpha > 1
    expected = [
        alpha * (reward - statistics.fmean(rewards[other] for other in members(inputs, sample)))
        for sample, reward in enumerate(rewards)
    ]
    assert_per_sample(GPG()(inputs).advantages, expected, inputs)
