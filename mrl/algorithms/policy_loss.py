"""PPO's clipped surrogate, per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mrl.algorithms.masking import require_same_shape

_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """Token losses and what happened to each token; all [b, t], all but `token_loss` without gradient."""

    token_loss: Tensor
    ratio: Tensor
    """New over old probability."""
    clipped: Tensor
    """Bool, the clipped ratio gave the loss: the token's gradient is zero."""
    clipped_lower: Tensor
    """Bool, the dual clip bounded the loss of a negative advantage: the token's gradient is zero."""
    approx_kl: Tensor
    """old_log_probs - log_probs, the k1 estimate of KL(old || new)."""


def compute_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> PolicyLoss:
    """Negative clipped surrogate objective of each token, with asymmetric and dual clipping.

    With r the probability ratio and A the advantage, the objective is min(r A, clip(r, 1 - clip_ratio_low,
    1 + clip_ratio_high) A); where A < 0 it is at least clip_ratio_c A. The log-ratio is clamped to [-20, 20] first.

    Args:
        log_probs: [b, t] float32, of the policy in training, with gradient.
        old_log_probs: [b, t] float32, before the first update of this step.
        advantages: [b, t] float32.
        clip_ratio_low, clip_ratio_high: how far the ratio may fall below and rise above 1.
        clip_ratio_c: bound of the dual clip, above 1.

    Returns:
        Losses (to be minimised) and diagnostics of every position, masked or not.

    Raises:
        ValueError: shapes differ, or a clip ratio is out of range.

    Source: Schulman et al., arXiv:1707.06347, eq. 7; dual clip: Ye et al., arXiv:1912.09729, eq. 5.
    """
    check_clip_ratios(clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high, clip_ratio_c=clip_ratio_c)
    require_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    surrogate = torch.maximum(unclipped, bounded)
    ceiling = -advantages * clip_ratio_c
    clipped_lower = (advantages < 0) & (surrogate > ceiling)
    return PolicyLoss(
        token_loss=torch.where(clipped_lower, ceiling, surrogate),
        ratio=ratio.detach(),
        clipped=(bounded > unclipped).detach(),
        clipped_lower=clipped_lower,
        approx_kl=-log_ratio.detach(),
    )


def check_clip_ratios(*, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float) -> None:
    """Raise ValueError unless 0 <= clip_ratio_low <= 1, clip_ratio_high >= 0 and clip_ratio_c > 1."""
    if not 0 <= clip_ratio_low <= 1 or clip_ratio_high < 0:
        raise ValueError(
            f"clip_ratio_low = {clip_ratio_low} must lie in [0, 1] and clip_ratio_high = {clip_ratio_high} must not be "
            "negative"
        )
    if clip_ratio_c <= 1:
        raise ValueError(f"clip_ratio_c = {clip_ratio_c} must be greater than 1: it bounds ratios that have risen")
