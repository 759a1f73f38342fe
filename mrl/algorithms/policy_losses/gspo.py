"""Group sequence policy optimization: one ratio for a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.masking import masked_mean
from mrl.algorithms.policy_losses.base import (
    PolicyInputs,
    PolicyTerms,
    SequenceLocalLoss,
    check_clip_range,
    clipped_surrogate,
)

_MAX_SEQUENCE_LOG_RATIO = 10.0


@dataclass(kw_only=True, frozen=True)
class GSPO(SequenceLocalLoss):
    """`loss_mode: gspo`. The clipped surrogate with the sequence's ratio in place of each token's.

    The ratio s of a sequence is the geometric mean of its n tokens' ratios, exp(mean_t log r_t) over trained tokens.
    The objective of token t is min(s_t A_t, clip(s_t, 1 - clip_ratio_low, 1 + clip_ratio_high) A_t), where s_t has
    the value of s and the gradient s d(log_probs_t): with one advantage for the whole sequence and the paper's
    `loss_agg_mode: seq-mean-token-mean` that is the gradient of mean_i min(s_i A_i, clip(s_i) A_i). Other
    aggregations are allowed, as in verl. log s is at most 10.

    The paper clips with 3e-4 below and 4e-4 above: a mean of logs moves far less than one token's. The configuration's
    default of 0.2 would hardly ever clip.

    Source: Zheng et al., arXiv:2507.18071, eqs. 5, 7, 14 (GSPO-token).
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2

    def __post_init__(self) -> None:
        check_clip_range(self.clip_ratio_low, self.clip_ratio_high)

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """Fractions: clip_fraction, whose tokens have no gradient."""
        log_probs = inputs.log_probs
        log_ratio = (log_probs - inputs.old_log_probs).detach()
        of_sequence = masked_mean(log_ratio, inputs.loss_mask, dim=1)[:, None]
        ratio = (log_probs - log_probs.detach() + of_sequence).clamp(max=_MAX_SEQUENCE_LOG_RATIO).exp()
        token_loss, clipped = clipped_surrogate(
            ratio, inputs.advantages, clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high
        )
        return PolicyTerms(token_loss=token_loss, ratio=ratio.detach(), fractions={"clip_fraction": clipped})
