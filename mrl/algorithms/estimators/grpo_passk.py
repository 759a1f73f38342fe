"""Advantages for the best of a group: only the sample that raises the group's maximum is reinforced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import (
    EPSILON,
    compute_group_std,
    compute_sample_rewards,
    spread_over_tokens,
)


@dataclass(kw_only=True, frozen=True)
class GRPOPassK:
    """`adv_estimator: grpo_passk`; k is the number of samples per prompt."""

    norm_adv_by_std_in_grpo: bool
    """Divide by the standard deviation of the group's rewards."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = max(r[G]) - second largest of r[G] for the group's best sample, 0 for the others.

        r[i] is the sum of the sample's rewards, [B]; where two share the maximum, all get 0. Optionally divided by
        std(r[G]) + 1e-6, with divisor n - 1.

        Raises:
            ValueError: a group has one sample, so no second largest reward.

        Source: Tang et al., arXiv:2503.19595: the maximum with a leave-one-out baseline.
        """
        rewards = compute_sample_rewards(inputs)
        advantages = _compute_lead(rewards, inputs.groups)
        if self.norm_adv_by_std_in_grpo:
            advantages = advantages / (compute_group_std(rewards, inputs.groups) + EPSILON)
        return spread_over_tokens(advantages, inputs.loss_mask)


def _compute_lead(rewards: Tensor, groups: Tensor) -> Tensor:
    """[B]: how far the best sample of each group is ahead of the next one, 0 for all others."""
    lead = torch.zeros_like(rewards)
    for number in groups.unique().tolist():
        members = (groups == number).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(
                "grpo_passk compares the best sample of a prompt with the next one, but a prompt has one sample; set "
                "actor_rollout_ref.rollout.n to at least 2"
            )
        best, second = rewards[members].topk(2).values
        lead[members[rewards[members].argmax()]] = best - second
    return lead
