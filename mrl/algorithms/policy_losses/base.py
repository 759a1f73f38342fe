"""What every policy loss is given and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mrl.algorithms.masking import require_same_shape
from mrl.types import TrainBatch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this on both sides before they are exponentiated; beyond it the gradient is zero."""


@dataclass(kw_only=True, frozen=True)
class PolicyInputs:
    """One micro-batch, [b, t]. Every sequence lies in it whole, so that losses may take means over a sequence."""

    tokens: Tensor
    """int64."""
    loss_mask: Tensor
    """bool, True on tokens that are trained."""
    log_probs: Tensor
    """float32, of the policy in training, with gradient."""
    old_log_probs: Tensor
    """float32, before the first update of this step."""
    advantages: Tensor
    """float32."""

    def __post_init__(self) -> None:
        require_same_shape(
            log_probs=self.log_probs,
            old_log_probs=self.old_log_probs,
            advantages=self.advantages,
            loss_mask=self.loss_mask,
            tokens=self.tokens,
        )

    @property
    def log_ratio(self) -> Tensor:
        """New minus old log-probs, clamped to +-MAX_LOG_RATIO."""
        return (self.log_probs - self.old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


class PolicyTerms(NamedTuple):
    """A loss of every token, masked or not, [b, t], and what there is to report."""

    token_loss: Tensor
    """To be minimised, with gradient; the mask and the aggregation are the caller's."""
    ratio: Tensor
    """New over old probability, as the loss takes it; without gradient."""
    fractions: Mapping[str, Tensor] = {}
    """Bool tensors by name, of which the share of trained tokens is reported."""


BoundPolicyLoss = Callable[[PolicyInputs], PolicyTerms]


@dataclass(kw_only=True, frozen=True)
class PolicyLoss(ABC):
    """One entry of `policy_loss.loss_mode` with its settings, whose fields have the names of their config keys."""

    loss_agg_mode: ClassVar[str | None] = None
    """The aggregation that belongs to the loss's definition; None takes the configured one."""

    @abstractmethod
    def bind(self, mini_batch: TrainBatch) -> BoundPolicyLoss:
        """The loss of micro-batches of `mini_batch`, whose loss_mask, old_log_probs and advantages are set.

        What a loss needs to know of more than one sequence, it takes from the whole mini-batch here, so that no split
        into micro-batches changes it. Every rank binds the same one.
        """

    def combine_weights(self, weights: Tensor, loss_mask: Tensor) -> Tensor:
        """How importance weights [b, t] of tokens multiply the token losses."""
        return weights


class SequenceLocalLoss(PolicyLoss):
    """A policy loss that needs nothing but the sequences at hand."""

    def bind(self, mini_batch: TrainBatch) -> BoundPolicyLoss:
        return self.compute

    @abstractmethod
    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """The loss of one micro-batch."""


def check_clip_range(clip_ratio_low: float, clip_ratio_high: float) -> None:
    """Raise ValueError unless 0 <= clip_ratio_low <= 1 and clip_ratio_high >= 0."""
    if not 0 <= clip_ratio_low <= 1 or clip_ratio_high < 0:
        raise ValueError(
            f"clip_ratio_low = {clip_ratio_low} must lie in [0, 1] and clip_ratio_high = {clip_ratio_high} must not be "
            "negative"
        )


def require_positive(**settings: float | None) -> None:
    """Raise ValueError, naming the setting, unless each is positive."""
    for name, value in settings.items():
        if value is None or not value > 0:
            raise ValueError(f"{name} = {value} must be positive")


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_ratio_low: float, clip_ratio_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate: -min(r A, clip(r, 1 - low, 1 + high) A), and where the clipped side gave it.

    Args:
        ratio, advantages: [b, t].

    Returns:
        token_loss: [b, t], with the ratio's gradient.
        clipped: [b, t] bool; the gradient is zero there.
    """
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    return torch.maximum(unclipped, bounded), (bounded > unclipped).detach()
