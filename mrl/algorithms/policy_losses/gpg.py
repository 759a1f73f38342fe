"""The plain policy gradient."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss


@dataclass(kw_only=True, frozen=True)
class GPG(SequenceLocalLoss):
    """`loss_mode: gpg`. -A log_prob: no ratio, no clipping, nothing that holds the policy to the old one.

    Meant for one update per rollout: later ones train on samples that are no longer the policy's without correcting
    for it. Its value depends on the log-probs' size and says little.

    Source: Chu et al., arXiv:2504.02546; Williams, 1992 (REINFORCE).
    """

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """No fractions; the ratio is only reported."""
        return PolicyTerms(
            token_loss=-inputs.advantages * inputs.log_probs, ratio=inputs.log_ratio.detach().exp(), fractions={}
        )
