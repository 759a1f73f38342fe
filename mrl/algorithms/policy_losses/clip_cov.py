"""Clip-Cov: no gradient for a few tokens whose update would cost the most entropy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mrl.algorithms.policy_losses.base import (
    BoundPolicyLoss,
    PolicyInputs,
    PolicyLoss,
    PolicyTerms,
    check_clip_range,
    clipped_surrogate,
    require_positive,
)
from mrl.algorithms.policy_losses.covariance import Covariance, smallest, token_priority
from mrl.types import TrainBatch


@dataclass(frozen=True)
class _Selection:
    covariance: Covariance
    last_priority: int | None
    """None: no token qualifies."""


@dataclass(kw_only=True, frozen=True)
class ClipCov(PolicyLoss):
    """`loss_mode: clip_cov`. The clipped surrogate without max(1, floor(clip_cov_ratio N)) of the N trained tokens.

    They are drawn from those whose covariance (see `Covariance`) lies between clip_cov_lb and clip_cov_ub, all of
    them if they are fewer; their loss is 0. No dual clip.

    N is the mini-batch's. verl 0.9.1 selects in each micro-batch, at least one token of it: with the default ratio of
    2e-4 and micro-batches of 1,000 tokens that is five times the ratio. It also leaves out tokens that are clipped
    already, which under the old log-probs none is; one that is clipped by now is zeroed without effect on the gradient.
    The draw is a hash of the sample, so that a sample's tokens have the same luck in each of a step's epochs.

    Source: Cui et al., arXiv:2505.22617 (Clip-Cov).
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0

    def __post_init__(self) -> None:
        check_clip_range(self.clip_ratio_low, self.clip_ratio_high)
        require_positive(clip_cov_ratio=self.clip_cov_ratio)
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ValueError(f"clip_cov_lb = {self.clip_cov_lb} must be below clip_cov_ub = {self.clip_cov_ub}")

    def bind(self, mini_batch: TrainBatch) -> BoundPolicyLoss:
        """Selects over the whole mini-batch."""
        covariance = Covariance.of(mini_batch)
        values = covariance.compute(mini_batch.required("advantages"), mini_batch.required("old_log_probs"))
        candidates = token_priority(mini_batch.tokens)[self._qualifies(values) & mini_batch.loss_mask]
        count = min(max(1, int(self.clip_cov_ratio * int(mini_batch.loss_mask.sum()))), candidates.numel())
        last = smallest(candidates, count) if count else None
        return partial(self._compute, selection=_Selection(covariance, last))

    def _qualifies(self, covariance: Tensor) -> Tensor:
        return (covariance > self.clip_cov_lb) & (covariance < self.clip_cov_ub)

    def _compute(self, inputs: PolicyInputs, *, selection: _Selection) -> PolicyTerms:
        ratio = inputs.log_ratio.exp()
        token_loss, clipped = clipped_surrogate(
            ratio, inputs.advantages, clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high
        )
        selected = self._selected(inputs, selection)
        return PolicyTerms(
            token_loss=torch.where(selected, torch.zeros_like(token_loss), token_loss),
            ratio=ratio.detach(),
            fractions={"clip_fraction": clipped, "clip_cov_fraction": selected},
        )

    def _selected(self, inputs: PolicyInputs, selection: _Selection) -> Tensor:
        if selection.last_priority is None:
            return torch.zeros_like(inputs.loss_mask)
        drawn = token_priority(inputs.tokens) <= selection.last_priority
        values = selection.covariance.compute(inputs.advantages, inputs.old_log_probs)
        return drawn & self._qualifies(values) & inputs.loss_mask
