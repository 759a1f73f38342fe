"""Covariance of log-prob and advantage over a mini-batch: what clip_cov and kl_cov select tokens by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mrl.algorithms.masking import masked_mean
from mrl.types import TrainBatch

_BASE, _MIX = 0x5851F42D4C957F2D, -0x40A7B892E31B1A47  # odd multipliers, int64


class Covariance(NamedTuple):
    """(A - mean A) (log_prob - mean log_prob) of each token, with the means of a whole mini-batch.

    The log-probs are the old ones, so that all ranks know the selection before the mini-batch's first forward pass and
    no split changes it. The published losses take the current log-probs and the means of one micro-batch. In the first
    update after a rollout, where old and current log-probs are equal, that differs by the means only, which scatter
    by a standard deviation over the root of the micro-batch's tokens; later, also by how far the policy has moved.
    """

    mean_advantage: float
    mean_log_prob: float

    @classmethod
    def of(cls, mini_batch: TrainBatch) -> Covariance:
        """The means over the trained tokens of a mini-batch."""
        mask = mini_batch.loss_mask
        return cls(
            float(masked_mean(mini_batch.required("advantages").double(), mask)),
            float(masked_mean(mini_batch.required("old_log_probs").double(), mask)),
        )

    def compute(self, advantages: Tensor, old_log_probs: Tensor) -> Tensor:
        """[b, t] float64, bitwise the same in any micro-batch and on any device: no sum is taken."""
        return (advantages.double() - self.mean_advantage) * (old_log_probs.double() - self.mean_log_prob)


def token_priority(tokens: Tensor) -> Tensor:
    """Pseudo-random order of tokens: a hash of each token and all before it in its sample. [b, t] int64 >= 0.

    A lottery that every rank draws alike, whatever the split, the order of samples or the padding, and after a resume.
    Equal prefixes, and those only, draw alike.
    """
    powers = torch.full_like(tokens[:1], _BASE).cumprod(1)
    prefix = ((tokens + 1) * powers).cumsum(1)
    mixed = (prefix ^ (prefix >> 32)) * _MIX
    return mixed ^ (mixed >> 29)


def smallest(values: Tensor, count: int) -> int:
    """The `count`-th smallest of `values` [n] int64: as many of them are at most that."""
    return int(values.kthvalue(count).values)
