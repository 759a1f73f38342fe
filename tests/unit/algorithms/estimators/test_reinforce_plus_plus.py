"""Whitened returns."""

import statistics

import pytest
import torch
from estimator_cases import random_inputs

from mrl.algorithms.estimators import AdvantageInputs
from mrl.algorithms.estimators.reinforce_plus_plus import ReinforcePlusPlus


def test_hand_worked_case_steps_over_tool_tokens():
    # Rewards 1 and 4 with a tool's token between them: returns 1 + 0.5 * 4 = 3 and 4; the other sample's is -1.
    inputs = AdvantageInputs(
        rewards=torch.tensor([[1.0, 9.0, 4.0], [9.0, -1.0, 9.0]]),
        loss_mask=torch.tensor([[True, False, True], [False, True, False]]),
        groups=torch.tensor([0, 1]),
    )
    advantages, returns = ReinforcePlusPlus(gamma=0.5)(inputs)
    assert returns.tolist() == [[3.0, 0.0, 4.0], [0.0, -1.0, 0.0]]
    # Mean 2, variance (1 + 4 + 9) / 2 = 7.
    expected = [1 / 7**0.5, 0.0, 2 / 7**0.5, 0.0, -3 / 7**0.5, 0.0]
    assert advantages.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_equals_the_definition():
    inputs, gamma = random_inputs(), 0.9
    tokens, returns = [], []
    for b, (rewards, mask) in enumerate(zip(inputs.rewards.tolist(), inputs.loss_mask.tolist(), strict=True)):
        steps = [t for t, on in enumerate(mask) if on]
        for i, t in enumerate(steps):
            tokens.append((b, t))
            returns.append(sum(gamma ** (j - i) * rewards[steps[j]] for j in range(i, len(steps))))
    mean, deviation = statistics.fmean(returns), statistics.stdev(returns)
    expected = torch.zeros_like(inputs.rewards)
    for (b, t), value in zip(tokens, returns, strict=True):
        expected[b, t] = (value - mean) / deviation
    # Nine float32 additions of numbers of size up to about 5.
    torch.testing.assert_close(ReinforcePlusPlus(gamma=gamma)(inputs).advantages, expected, rtol=0, atol=5e-6)
