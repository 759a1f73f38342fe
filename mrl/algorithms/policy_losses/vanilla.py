"""PPO's clipped surrogate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrl.algorithms.policy_losses.base import (
    PolicyInputs,
    PolicyTerms,
    SequenceLocalLoss,
    check_clip_range,
    clipped_surrogate,
)


@dataclass(kw_only=True, frozen=True)
class Vanilla(SequenceLocalLoss):
    """`loss_mode: vanilla`. Negative clipped surrogate objective of each token, with asymmetric and dual clipping.

    With r the probability ratio and A the advantage, the objective is min(r A, clip(r, 1 - clip_ratio_low,
    1 + clip_ratio_high) A); where A < 0 it is at least clip_ratio_c A.

    Source: Schulman et al., arXiv:1707.06347, eq. 7; dual clip: Ye et al., arXiv:1912.09729, eq. 5.
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    """Bound of the dual clip, above 1."""

    def __post_init__(self) -> None:
        check_clip_range(self.clip_ratio_low, self.clip_ratio_high)
        if self.clip_ratio_c <= 1:
            raise ValueError(
                f"clip_ratio_c = {self.clip_ratio_c} must be greater than 1: it bounds ratios that have risen"
            )

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """Fractions: clip_fraction, and clip_fraction_lower where the dual clip acts; both stop the gradient."""
        advantages, ratio = inputs.advantages, inputs.log_ratio.exp()
        surrogate, clipped = clipped_surrogate(
            ratio, advantages, clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high
        )
        ceiling = -advantages * self.clip_ratio_c
        clipped_lower = (advantages < 0) & (surrogate > ceiling)
        return PolicyTerms(
            token_loss=torch.where(clipped_lower, ceiling, surrogate),
            ratio=ratio.detach(),
            fractions={"clip_fraction": clipped, "clip_fraction_lower": clipped_lower},
        )
