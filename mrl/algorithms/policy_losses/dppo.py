"""Divergence proximal policy optimization: mask by a divergence of the token's probability, not by its ratio."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss

_EPSILON = 1e-8


@dataclass(kw_only=True, frozen=True)
class _DPPO(SequenceLocalLoss):
    """-sg(min(r, clip_ratio_c)) A log_prob on tokens within the trust region, 0 outside it; sg without gradient.

    A token is outside when its update would take it further than a divergence allows: clip_ratio_high bounds it
    upwards (A > 0), clip_ratio_low downwards. They are divergences here, not distances of a ratio from 1.

    Source: arXiv:2602.04879; names and bounds of verl 0.9.1. The paper advises a large clip_ratio_c (20).
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    """Truncation of the importance weight."""

    def __post_init__(self) -> None:
        if min(self.clip_ratio_low, self.clip_ratio_high) < 0 or self.clip_ratio_c <= 1:
            raise ValueError(
                f"clip_ratio_low = {self.clip_ratio_low} and clip_ratio_high = {self.clip_ratio_high} must not be "
                f"negative and clip_ratio_c = {self.clip_ratio_c} must be greater than 1"
            )

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """Fractions: clip_fraction, tokens outside; clip_fraction_lower, tokens inside with a truncated weight."""
        ratio = inputs.log_ratio.detach().exp()
        rises, falls = self._outside(inputs.log_probs.detach().exp(), inputs.old_log_probs.exp(), inputs)
        outside = torch.where(inputs.advantages > 0, rises, falls)
        loss = -ratio.clamp(max=self.clip_ratio_c) * inputs.advantages * inputs.log_probs
        return PolicyTerms(
            token_loss=torch.where(outside, torch.zeros_like(loss), loss),
            ratio=ratio,
            fractions={"clip_fraction": outside, "clip_fraction_lower": (ratio > self.clip_ratio_c) & ~outside},
        )

    @abstractmethod
    def _outside(self, prob: Tensor, old_prob: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """[b, t] bool: too far up, and too far down."""


class DPPOTV(_DPPO):
    """`loss_mode: dppo_tv`. Total variation of the sampled token against all others: |p - p_old|."""

    def _outside(self, prob: Tensor, old_prob: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        return prob - old_prob > self.clip_ratio_high, old_prob - prob > self.clip_ratio_low


class DPPOKL(_DPPO):
    """`loss_mode: dppo_kl`. KL(old || new) of the sampled token against all others, a Bernoulli's."""

    def _outside(self, prob: Tensor, old_prob: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        others = torch.log((1 - old_prob + _EPSILON) / (1 - prob + _EPSILON))
        kl = old_prob * (inputs.old_log_probs - inputs.log_probs.detach()) + (1 - old_prob) * others
        rises, falls = prob > old_prob, prob < old_prob
        return rises & (kl > self.clip_ratio_high), falls & (kl > self.clip_ratio_low)
