"""Rewards of whole samples and their statistics over the samples of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.masking import masked_sum

EPSILON = 1e-6
"""Added to a group's standard deviation, as verl does."""


def compute_sample_rewards(inputs: AdvantageInputs) -> Tensor:
    """Each sample's reward, summed over its trained tokens. [B] float64, so that equal rewards have no spread."""
    return masked_sum(inputs.rewards.double(), inputs.loss_mask, dim=1)


def count_in_group(groups: Tensor) -> Tensor:
    """For each sample, the number of samples of its group. [B] int64 of [B] int64."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return sizes[index]


def compute_group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """For each sample, the mean of its group's values. [B] float64 of [B] float64 and [B] int64."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(sizes)).index_add_(0, index, values)
    return (sums / sizes)[index]


def compute_group_baseline(values: Tensor, groups: Tensor) -> Tensor:
    """The group's mean, as `compute_group_mean`; 0 for a sample that is alone, which has nothing to compare with."""
    return torch.where(count_in_group(groups) > 1, compute_group_mean(values, groups), 0.0)


def compute_group_std(values: Tensor, groups: Tensor) -> Tensor:
    """For each sample, the sample standard deviation (divisor n - 1) of its group's values; 1 for one that is alone."""
    sizes = count_in_group(groups)
    squares = compute_group_mean((values - compute_group_mean(values, groups)).square(), groups)
    return torch.where(sizes > 1, (squares * sizes / (sizes - 1).clamp(min=1)).sqrt(), 1.0)


def spread_over_tokens(per_sample: Tensor, loss_mask: Tensor) -> Advantages:
    """[B] numbers as advantages, and returns, of all trained tokens of their samples."""
    per_token = torch.where(loss_mask, per_sample[:, None].float(), 0.0)
    return Advantages(per_token, per_token)
