"""REINFORCE with discounted returns, whitened over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.advantages import compute_gae, whiten_
from mrl.algorithms.estimators.base import AdvantageInputs, Advantages


@dataclass(kw_only=True, frozen=True)
class ReinforcePlusPlus:
    """`adv_estimator: reinforce_plus_plus`."""

    gamma: float

    @torch.no_grad()
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """A = whiten(R) over all trained tokens of the batch, with R[i, t] = reward[i, t] + gamma * R[i, t + 1].

        t + 1 is the next trained token: masked ones are stepped over. R, [B, T], is GAE for lam = 1 and a critic that
        is always zero.

        Source: Hu et al., arXiv:2501.03262.
        """
        zeros = torch.zeros_like(inputs.rewards)
        _, returns = compute_gae(inputs.rewards, zeros, inputs.loss_mask, gamma=self.gamma, lam=1.0)
        return Advantages(whiten_(returns.clone(), inputs.loss_mask), returns)
