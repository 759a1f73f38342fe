"""Rewards less their group's mean weighted by length, the baseline of least variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import (
    compute_group_mean,
    compute_sample_rewards,
    count_in_group,
    spread_over_tokens,
)


@dataclass(kw_only=True, frozen=True)
class OPO:
    """`adv_estimator: opo`."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = r[i] - sum(l[j] r[j]) / sum(l[j]) over the samples j of the group.

        r[i] is the sum of the sample's rewards, l[i] the number of its trained tokens, both [B]. A group of one sample
        gets its reward.

        Source: Hao et al., arXiv:2505.23585: the optimal baseline where gradient norms grow with the length.
        """
        rewards, groups = compute_sample_rewards(inputs), inputs.groups
        lengths = inputs.loss_mask.sum(1).double()
        # 0 / 0 in a group without a trained token: it reaches none.
        weighted = compute_group_mean(lengths * rewards, groups) / compute_group_mean(lengths, groups)
        baseline = torch.where(count_in_group(groups) > 1, weighted, 0.0)
        return spread_over_tokens(rewards - baseline, inputs.loss_mask)
