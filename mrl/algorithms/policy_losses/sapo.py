"""Soft adaptive policy optimization: a smooth gate in place of clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss, require_positive


@dataclass(kw_only=True, frozen=True)
class SAPO(SequenceLocalLoss):
    """`loss_mode: sapo`. -f(r) A with f(r) = sigmoid(tau (r - 1)) * 4 / tau, tau = tau_pos where A > 0, else tau_neg.

    At r = 1 the gradient is that of r A; away from it, it fades smoothly, faster with a larger tau. The aggregation is
    seq-mean-token-mean whatever is configured, as in the paper and in verl.

    Source: Gao et al., arXiv:2511.20347.
    """

    loss_agg_mode: ClassVar[str | None] = "seq-mean-token-mean"

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        require_positive(tau_pos=self.tau_pos, tau_neg=self.tau_neg)

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """No fractions: nothing is clipped."""
        ratio, advantages = inputs.log_ratio.exp(), inputs.advantages
        tau = torch.full_like(ratio, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        gate = torch.sigmoid(tau * (ratio - 1)) * (4 / tau)
        return PolicyTerms(token_loss=-gate * advantages, ratio=ratio.detach(), fractions={})
