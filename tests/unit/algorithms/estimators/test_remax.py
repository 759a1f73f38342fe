"""Returns against the greedy response's score."""

import torch
from estimator_cases import random_inputs

from mrl.algorithms.estimators import AdvantageInputs
from mrl.algorithms.estimators.remax import ReMax


def test_hand_worked_case():
    inputs = AdvantageInputs(
        rewards=torch.tensor([[-0.5, 9.0, 2.0], [9.0, 1.0, 9.0]]),
        loss_mask=torch.tensor([[True, False, True], [False, True, False]]),
        groups=torch.tensor([0, 1]),
        baselines=torch.tensor([1.0, 3.0]),
    )
    advantages, returns = ReMax()(inputs)
    assert returns.tolist() == [[1.5, 0.0, 2.0], [0.0, 1.0, 0.0]]
    assert advantages.tolist() == [[0.5, 0.0, 1.0], [0.0, -2.0, 0.0]]


def test_equals_the_definition():
    inputs = random_inputs()
    assert inputs.baselines is not None
    expected = torch.zeros_like(inputs.rewards)
    for b, mask in enumerate(inputs.loss_mask.tolist()):
        for t in (t for t, on in enumerate(mask) if on):
            to_go = sum(inputs.rewards[b, later].item() for later in range(t, len(mask)) if mask[later])
            expected[b, t] = to_go - inputs.baselines[b].item()
    # Nine float32 additions of numbers of size up to about 5.
    torch.testing.assert_close(ReMax()(inputs).advantages, expected, rtol=0, atol=5e-6)
