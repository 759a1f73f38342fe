"""Inputs of advantage estimators: small ones by hand, and random ones with gaps and with groups out of order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mrl.algorithms.estimators import AdvantageInputs


def one_token_inputs(rewards: Sequence[float], groups: Sequence[int]) -> AdvantageInputs:
    """Samples of a prompt token and one trained token, which carries the reward."""
    mask = torch.tensor([[False, True]]).expand(len(rewards), 2)
    return AdvantageInputs(
        rewards=torch.tensor([[0.0, reward] for reward in rewards]), loss_mask=mask, groups=torch.tensor(groups)
    )


def random_inputs(seed: int = 0, *, num_groups: int = 4, n: int = 5, width: int = 9) -> AdvantageInputs:
    """Groups of n samples, shuffled, with rewards on every trained token and everything else that any estimator needs.

    The first group's samples all have the same reward.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_groups).repeat_interleave(n)[torch.randperm(num_groups * n, generator=generator)]
    mask = torch.rand(len(groups), width, generator=generator) < 0.6
    mask[:, -2] = True
    rewards = torch.randn(len(groups), width, generator=generator) * mask
    rewards[groups == 0] = 0.0
    rewards[groups == 0, -2] = 0.1
    return AdvantageInputs(
        rewards=rewards,
        loss_mask=mask,
        groups=groups,
        values=torch.randn(len(groups), width, generator=generator),
        baselines=torch.randn(num_groups, generator=generator)[groups],
    )


def totals(inputs: AdvantageInputs) -> list[float]:
    """Every sample's reward, summed in Python."""
    pairs = zip(inputs.rewards.tolist(), inputs.loss_mask.tolist(), strict=True)
    return [sum(reward for reward, on in zip(row, mask, strict=True) if on) for row, mask in pairs]


def members(inputs: AdvantageInputs, sample: int) -> list[int]:
    """The samples of the same group, itself included."""
    groups = inputs.groups.tolist()
    return [other for other, number in enumerate(groups) if number == groups[sample]]


def assert_per_sample(found: torch.Tensor, expected: Sequence[float], inputs: AdvantageInputs) -> None:
    """Every trained token has its sample's number, every other 0, to float32 rounding of numbers of size up to 10."""
    wanted = torch.tensor(expected)[:, None] * inputs.loss_mask
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
