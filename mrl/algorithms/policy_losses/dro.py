"""Direct reward optimization."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.policy_losses.base import PolicyInputs, PolicyTerms, SequenceLocalLoss, require_positive


@dataclass(kw_only=True, frozen=True)
class DRO(SequenceLocalLoss):
    """`loss_mode: dro`. -(A log_prob - dro_beta / 2 (log_prob - old_log_prob)^2): a quadratic hold on the policy.

    The per-token form that verl 0.9.1 publishes. dro_beta has no default: its scale is that of the advantages.

    Source: Richemond et al., arXiv:2405.19107, whose squared error (A - dro_beta log r)^2 / 2 has dro_beta times
    this gradient.
    """

    dro_beta: float | None = None

    def __post_init__(self) -> None:
        require_positive(dro_beta=self.dro_beta)

    def compute(self, inputs: PolicyInputs) -> PolicyTerms:
        """No fractions."""
        assert self.dro_beta is not None
        drift = inputs.log_probs - inputs.old_log_probs
        penalty = 0.5 * self.dro_beta * drift.square()
        return PolicyTerms(
            token_loss=penalty - inputs.advantages * inputs.log_probs,
            ratio=inputs.log_ratio.detach().exp(),
            fractions={},
        )
