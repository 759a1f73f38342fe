"""Group-relative advantages scaled up by the share of samples that earn nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import compute_group_baseline, compute_sample_rewards, spread_over_tokens


@dataclass(kw_only=True, frozen=True)
class GPG:
    """`adv_estimator: gpg`."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = alpha * (r[i] - mean(r[G])), alpha = B / (number of samples whose reward is not 0).

        r[i] is the sum of the sample's rewards, [B]. The paper counts the samples of groups that have a gradient; verl,
        followed here, those whose reward is not 0. A group of one sample gets alpha * r.

        Source: Chu et al., arXiv:2504.02546; alpha as in verl 0.9.1.
        """
        rewards = compute_sample_rewards(inputs)
        alpha = len(rewards) / rewards.count_nonzero().clamp(min=1)
        return spread_over_tokens(alpha * (rewards - compute_group_baseline(rewards, inputs.groups)), inputs.loss_mask)
