"""Rewards without their group's mean, whitened over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.advantages import whiten_
from mrl.algorithms.estimators.base import AdvantageInputs, Advantages
from mrl.algorithms.estimators.outcome import compute_group_baseline, compute_sample_rewards, spread_over_tokens


@dataclass(kw_only=True, frozen=True)
class ReinforcePlusPlusBaseline:
    """`adv_estimator: reinforce_plus_plus_baseline`."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A = whiten(r[i] - mean(r[G])) over all trained tokens of the batch; so long samples weigh more in it.

        r[i] is the sum of the sample's rewards, [B]. As in verl, returns are the advantages.

        Source: Hu et al., arXiv:2501.03262, the variant for several samples per prompt.
        """
        rewards = compute_sample_rewards(inputs)
        centered = spread_over_tokens(rewards - compute_group_baseline(rewards, inputs.groups), inputs.loss_mask)
        whitened = whiten_(centered.advantages, inputs.loss_mask)
        return Advantages(whitened, whitened)
