"""Generalized advantage estimation, whitened over the batch."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.advantages import compute_gae, whiten
from mrl.algorithms.estimators.base import AdvantageInputs, Advantages


@dataclass(kw_only=True, frozen=True)
class GAE:
    """`adv_estimator: gae`. The critic's targets are the returns before whitening."""

    gamma: float
    lam: float

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """See `compute_gae` and `whiten`."""
        assert inputs.values is not None, "gae needs a critic's values"
        advantages, returns = compute_gae(
            inputs.rewards, inputs.values, inputs.loss_mask, gamma=self.gamma, lam=self.lam
        )
        return Advantages(whiten(advantages, inputs.loss_mask), returns)
