"""Group-relative advantages, with and without division by the group's standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import (
    EPSILON,
    compute_group_baseline,
    compute_group_std,
    compute_sample_rewards,
    spread_over_tokens,
)


@dataclass(kw_only=True, frozen=True)
class GRPO:
    """`adv_estimator: grpo`; verl's `grpo_vectorized` is the same."""

    norm_adv_by_std_in_grpo: bool
    """Divide by the standard deviation; without it this is Dr. GRPO."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = (r[i] - mean(r[G])) / (std(r[G]) + 1e-6), the same on all trained tokens of sample i.

        r[i] is the sum of the sample's rewards, [B]; the standard deviation has the divisor n - 1. A group whose
        rewards are all equal gets zero, a group of one sample its reward.

        Source: Shao et al., arXiv:2402.03300, section 4.1.2; without the division Liu et al., arXiv:2503.20783.
        """
        rewards = compute_sample_rewards(inputs)
        advantages = rewards - compute_group_baseline(rewards, inputs.groups)
        if self.norm_adv_by_std_in_grpo:
            advantages = advantages / (compute_group_std(rewards, inputs.groups) + EPSILON)
        return spread_over_tokens(advantages, inputs.loss_mask)
