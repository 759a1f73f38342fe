"""Clipped importance sampling policy optimization: clip the weight, keep the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss, check_clip_range


@dataclass(kw_only=True, frozen=True)
class CISPO(SequenceLocalLoss):
    """`loss_mode: cispo`. REINFORCE with a clipped importance weight that carries no gradient.

    The loss of a token is -sg(clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high)) A log_prob, sg without gradient: unlike
    the clipped surrogate it leaves every token its gradient. Its value depends on the log-probs' size and says little.

    Source: MiniMax, arXiv:2506.13585, eqs. 4 and 5. The paper bounds the weight above only, which is
    clip_ratio_low = 1, and normalizes by the tokens of a group; the configuration's aggregation decides here.
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2

    def __post_init__(self) -> None:
        check_clip_range(self.clip_ratio_low, self.clip_ratio_high)

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """Fractions: clip_fraction, the tokens whose weight is a bound."""
        ratio = inputs.log_ratio.detach().exp()
        weight = ratio.clamp(1 - self.clip_ratio_low, 1 + self.clip_ratio_high)
        return PolicyTerms(
            token_loss=-weight * inputs.advantages * inputs.log_probs,
            ratio=ratio,
            fractions={"clip_fraction": ratio != weight},
        )
