"""Geometric-mean policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mrl.algorithms.masking import masked_mean
from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss


@dataclass(kw_only=True, frozen=True)
class GeoMean(SequenceLocalLoss):
    """`loss_mode: geo_mean`. The geometric mean of a sequence's pessimistically clipped token ratios.

    With d_t the log-ratio and A the mean advantage of a sequence's trained tokens, each d_t is bounded on the
    pessimistic side only, to at most clip_ratio_high where A_t > 0 and at least -clip_ratio_low where A_t < 0, and
    the sequence's loss is -A exp(mean_t d_t). Clipped tokens have no gradient. The ranges are those of logs: the
    paper's (e^-0.4, e^0.4) is clip_ratio_low = clip_ratio_high = 0.4, wider than PPO's.

    Every token carries its sequence's loss and the aggregation is seq-mean-token-mean whatever is configured, which
    makes the mini-batch's loss the mean over its sequences. verl averages over the sequences of a micro-batch, those
    without a trained token included; micro-batches of equal size give the same, others weigh sequences differently.

    Source: Zhao et al., arXiv:2507.20673; a sequence's advantage is the mean over its tokens as in verl 0.9.1.
    """

    loss_agg_mode: ClassVar[str | None] = "seq-mean-token-mean"

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2

    def __post_init__(self) -> None:
        if min(self.clip_ratio_low, self.clip_ratio_high) < 0:
            raise ValueError(
                f"clip_ratio_low = {self.clip_ratio_low} and clip_ratio_high = {self.clip_ratio_high} must not be "
                "negative: they bound the log-ratio"
            )

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """Fractions: clip_fraction and clip_fraction_lower, log-ratios out of range where A > 0 and where A < 0."""
        log_ratio, mask, advantages = inputs.log_ratio, inputs.loss_mask, inputs.advantages
        bounded = log_ratio.clamp(-self.clip_ratio_low, self.clip_ratio_high)
        sign = advantages.sign()
        pessimistic = sign * torch.minimum(sign * log_ratio, sign * bounded)
        ratio = masked_mean(pessimistic, mask, dim=1).exp()
        loss = -masked_mean(advantages, mask, dim=1) * ratio
        outside = (log_ratio != bounded).detach()
        return PolicyTerms(
            token_loss=loss[:, None].expand_as(log_ratio),
            ratio=ratio.detach()[:, None].expand_as(log_ratio),
            fractions={
                "clip_fraction": outside & (advantages > 0),
                "clip_fraction_lower": outside & (advantages < 0),
            },
        )

    def combine_weights(self, weights: Tensor, loss_mask: Tensor) -> Tensor:
        """The geometric mean of a sequence's weights, as its ratio is one."""
        return masked_mean(weights.log(), loss_mask, dim=1).exp()[:, None].expand_as(weights)
