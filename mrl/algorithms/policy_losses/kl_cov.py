"""KL-Cov: hold on to the tokens whose update would cost the most entropy."""

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
    require_positive,
)
from mrl.algorithms.policy_losses.covariance import Covariance, smallest, token_priority
from mrl.types import TrainBatch

_ROUNDING = 1e-4


@dataclass(frozen=True)
class _Selection:
    covariance: Covariance
    bound: float
    """Tokens above it are selected, and of those at it the ones up to `last_priority`."""
    last_priority: int


@dataclass(kw_only=True, frozen=True)
class KLCov(PolicyLoss):
    """`loss_mode: kl_cov`. -r A, plus ppo_kl_coef |log r| on the max(1, floor(kl_cov_ratio N)) tokens of N trained ones
    that have the highest covariance (see `Covariance`). Nothing is clipped.

    N is the mini-batch's. verl 0.9.1 selects in each micro-batch, at least one token of it: with the default ratio of
    2e-4 and micro-batches of 1,000 tokens that is five times the ratio. Equal covariances are told apart by a hash.

    |log r| has the gradient +-1 however small it is. In the first update after a rollout log r is rounding, and with it
    the sign: up to 1e-4 it counts as 0 here, without gradient, so that rounding decides nothing in float32.

    Source: Cui et al., arXiv:2505.22617 (KL-Cov); |log r| as its code and verl's estimate the KL.
    """

    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1

    def __post_init__(self) -> None:
        require_positive(kl_cov_ratio=self.kl_cov_ratio)
        if self.kl_cov_ratio > 1 or self.ppo_kl_coef < 0:
            raise ValueError(
                f"kl_cov_ratio = {self.kl_cov_ratio} must be at most 1 and ppo_kl_coef = {self.ppo_kl_coef} must not "
                "be negative"
            )

    def bind(self, mini_batch: TrainBatch) -> BoundPolicyLoss:
        """Selects over the whole mini-batch."""
        mask, covariance = mini_batch.loss_mask, Covariance.of(mini_batch)
        values = covariance.compute(mini_batch.required("advantages"), mini_batch.required("old_log_probs"))[mask]
        if not values.numel():
            return partial(self._compute, selection=_Selection(covariance, torch.inf, 0))
        count = max(1, int(self.kl_cov_ratio * values.numel()))
        bound = values.topk(count).values[-1]
        at_bound = token_priority(mini_batch.tokens)[mask][values == bound]
        last = smallest(at_bound, count - int((values > bound).sum()))
        return partial(self._compute, selection=_Selection(covariance, float(bound), last))

    def _compute(self, inputs: PolicyInputs, *, selection: _Selection) -> PolicyTerms:
        log_ratio = inputs.log_ratio
        ratio, selected = log_ratio.exp(), _selected(inputs, selection)
        held = selected & (log_ratio.detach().abs() > _ROUNDING)
        penalty = torch.where(held, self.ppo_kl_coef * log_ratio.abs(), torch.zeros_like(log_ratio))
        return PolicyTerms(
            token_loss=penalty - inputs.advantages * ratio,
            ratio=ratio.detach(),
            fractions={"kl_cov_fraction": selected},
        )


def _selected(inputs: PolicyInputs, selection: _Selection) -> Tensor:
    values = selection.covariance.compute(inputs.advantages, inputs.old_log_probs)
    drawn = (values == selection.bound) & (token_priority(inputs.tokens) <= selection.last_priority)
    return ((values > selection.bound) | drawn) & inputs.loss_mask
