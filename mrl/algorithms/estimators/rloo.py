"""REINFORCE with the other samples of the prompt as the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import (
    compute_group_baseline,
    compute_sample_rewards,
    count_in_group,
    spread_over_tokens,
)


@dataclass(kw_only=True, frozen=True)
class RLOO:
    """`adv_estimator: rloo`; verl's `rloo_vectorized` is the same for groups of two and more."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = r[i] - mean of the other rewards of the group = n / (n - 1) * (r[i] - mean(r[G])).

        r[i] is the sum of the sample's rewards, [B]; all trained tokens of a sample share its advantage. A group of one
        sample gets its reward.

        Source: Ahmadian et al., arXiv:2402.14740, "REINFORCE Leave-One-Out".
        """
        rewards = compute_sample_rewards(inputs)
        sizes = count_in_group(inputs.groups)
        others = torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), 1.0)
        return spread_over_tokens(others * (rewards - compute_group_baseline(rewards, inputs.groups)), inputs.loss_mask)
