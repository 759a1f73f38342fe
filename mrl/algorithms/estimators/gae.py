"""Generalized advantage estimation, whitened over the batch."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.algorithms.advantages import compute_gae, whiten_
from mrl.algorithms.estimators.base import AdvantageInputs, Advantages


@dataclass(kw_only=True, frozen=True)
class GAE:
    """`adv_estimator: gae`. The critic's targets are the returns before whitening."""

    gamma: float
    lam: float

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """See `compute_gae` and `whiten_`; the rewards' memory holds the advantages afterwards."""
        assert inputs.values is not None, "gae needs a critic's values"
        rewards, mask = inputs.rewards, inputs.loss_mask
        # At 10^8 tokens a further tensor would cost a tenth of a second in pages alone.
        advantages, returns = compute_gae(rewards, inputs.values, mask, gamma=self.gamma, lam=self.lam, out=rewards)
        return Advantages(whiten_(advantages, mask), returns)
