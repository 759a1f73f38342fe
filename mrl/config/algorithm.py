"""Settings of advantages and the in-reward KL penalty: section `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.actor import KLKind
from mrl.config.checks import at_least, more_than, within
from mrl.config.rollout_correction import RolloutCorrectionConfig
from mrl.config.section import Section

AdvEstimator = Literal[
    "gae",
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "rloo_vectorized",
]
CRITIC_ESTIMATORS = frozenset[str]({"gae"})
"""The estimators that need a critic's values."""
GREEDY_ESTIMATORS = frozenset[str]({"remax"})
"""Those that need a greedy response to every prompt."""
GROUP_ESTIMATORS = frozenset[str](
    {
        "gpg",
        "grpo",
        "grpo_passk",
        "grpo_vectorized",
        "opo",
        "reinforce_plus_plus_baseline",
        "rloo",
        "rloo_vectorized",
    }
)
"""Those that compare the responses to one prompt with each other."""
DISCOUNTING_ESTIMATORS = frozenset[str]({"gae", "reinforce_plus_plus"})
"""Those that read `gamma`."""
SCALING_ESTIMATORS = frozenset[str]({"grpo", "grpo_passk", "grpo_vectorized"})
"""Those that read `norm_adv_by_std_in_grpo`."""


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
class FilterGroupsConfig(Section):
    """DAPO's dynamic sampling: further prompts in place of those whose responses all score the same."""

    enable: bool = False
    """Fill each step with prompts whose responses differ."""
    metric: str = "reward"
    """What has to differ: reward; acc or score, which is the reward before DAPO's penalty on long responses; or another
    number that the reward function returns."""
    max_num_gen_batches: int = 0
    """Generation batches in which a step has to be filled, or the run ends; 0 is no limit."""

    def check(self) -> None:
        at_least(self, 0, "max_num_gen_batches")


@dataclass(kw_only=True, frozen=True)
class AlgorithmConfig(Section):
    """From rewards to advantages."""

    adv_estimator: AdvEstimator = "gae"
    """Advantage estimator; docs/algorithms.md has their formulas. Only gae has a critic."""
    gamma: float = 1.0
    """Discount per token, of gae and reinforce_plus_plus."""
    lam: float = 1.0
    """GAE's trade of bias against variance."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the standard deviation of the prompt's rewards in grpo and grpo_passk; False is Dr. GRPO."""
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    """DAPO's dynamic sampling."""
    use_kl_in_reward: bool = False
    """Subtract a KL penalty against the reference from every token's reward."""
    kl_penalty: KLKind = "kl"
    """Estimator of that penalty."""
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    """Coefficient of that penalty."""

    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    """Correction for samples from another distribution than the trainer's."""

    def check(self) -> None:
        within(self, 0, 1, "gamma", "lam")
