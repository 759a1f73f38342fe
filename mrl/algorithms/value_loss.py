"""PPO's clipped value loss, per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mrl.algorithms.masking import require_same_shape


class ValueLoss(NamedTuple):
    """Token losses and which of them are clipped; [b, t]."""

    token_loss: Tensor
    clipped: Tensor
    """Bool, the clipped value gave the loss: the token's gradient is zero."""


def compute_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> ValueLoss:
    """Half the larger of the squared errors of the value and of the value kept within a range of the old one.

    Args:
        values: [b, t] float32, of the critic in training, with gradient.
        old_values: [b, t] float32, before the first update of this step.
        returns: [b, t] float32, the regression target.
        cliprange_value: how far the value may move from the old one before its gradient stops; positive.

    Returns:
        Losses and diagnostics of every position, masked or not.

    Raises:
        ValueError: shapes differ, or cliprange_value is not positive.

    Source: the value clipping of OpenAI baselines' ppo2; Huang et al., "The 37 Implementation Details of PPO" (2022).
    """
    check_cliprange_value(cliprange_value)
    require_same_shape(values=values, old_values=old_values, returns=returns)
    bounded = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    error = (values - returns).square()
    bounded_error = (bounded - returns).square()
    return ValueLoss(
        token_loss=0.5 * torch.maximum(error, bounded_error),
        clipped=(bounded_error > error).detach(),
    )


def check_cliprange_value(cliprange_value: float) -> None:
    """Raise ValueError unless `cliprange_value` is positive."""
    if cliprange_value <= 0:
        raise ValueError(f"critic.cliprange_value = {cliprange_value} must be positive; a large one turns clipping off")
