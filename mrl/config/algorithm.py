"""Settings of advantages and the in-reward KL penalty: section `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.actor import KLKind
from mrl.config.checks import at_least, more_than, within
from mrl.config.section import Section

AdvEstimator = Literal["gae"]
CRITIC_ESTIMATORS: frozenset[str] = frozenset({"gae"})
"""The estimators that need a critic's values."""


@dataclass(kw_only=True, frozen=True)
class KLCtrlConfig(Section):
    """Coefficient of the in-reward KL penalty."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """Keep `kl_coef`, or steer it towards `target_kl`."""
    kl_coef: float = 0.001
    """The (initial) coefficient; acts only with `algorithm.use_kl_in_reward`."""
    horizon: int = 10000
    """Samples over which the adaptive controller corrects."""
    target_kl: float = 0.1
    """KL that the adaptive controller aims at."""

    def check(self) -> None:
        at_least(self, 0, "kl_coef")
        at_least(self, 1, "horizon")
        more_than(self, 0, "target_kl")


@dataclass(kw_only=True, frozen=True)
class AlgorithmConfig(Section):
    """From rewards to advantages."""

    adv_estimator: AdvEstimator = "gae"
    """Advantage estimator."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """GAE's trade of bias against variance."""
    use_kl_in_reward: bool = False
    """Subtract a KL penalty against the reference from every token's reward."""
    kl_penalty: KLKind = "kl"
    """Estimator of that penalty."""
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    """Coefficient of that penalty."""

    def check(self) -> None:
        within(self, 0, 1, "gamma", "lam")
