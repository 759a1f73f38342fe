"""REINFORCE with the reward of the greedy response as the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.advantages import compute_gae
from mrl.algorithms.estimators.base import AdvantageInputs, Advantages


@dataclass(kw_only=True, frozen=True)
class ReMax:
    """`adv_estimator: remax`. One more response per prompt is generated, greedily, and scored."""

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A[i, t] = sum of reward[i, t'] over trained t' >= t, less the greedy response's score.

        The returns are those sums, [B, T]. The baseline, [B], carries no KL penalty: the greedy response is scored
        only.

        Source: Li et al., arXiv:2310.10505, algorithm 1.
        """
        assert inputs.baselines is not None, "remax needs the scores of greedy responses"
        zeros = torch.zeros_like(inputs.rewards)
        _, returns = compute_gae(inputs.rewards, zeros, inputs.loss_mask, gamma=1.0, lam=1.0)
        return Advantages(torch.where(inputs.loss_mask, returns - inputs.baselines[:, None], 0.0), returns)
