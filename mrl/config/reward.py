"""Settings of scoring: section `reward`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, more_than
from mrl.config.frozen import FrozenDict
from mrl.config.reward_shaping import RewardKwargsConfig, RewardManagerConfig
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class CustomRewardFunctionConfig(Section):
    """A reward function from a file."""

    path: str | None = None
    """Python file; null takes the rule-based reward of each sample's data source."""
    name: str = "compute_score"
    """Function in that file."""
    reward_kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Keyword arguments added to every call."""


@dataclass(kw_only=True, frozen=True)
class RewardConfig(Section):
    """How samples are scored."""

    custom_reward_function: CustomRewardFunctionConfig = field(default_factory=CustomRewardFunctionConfig)
    """A reward function from a file."""
    reward_manager: RewardManagerConfig = field(default_factory=RewardManagerConfig)
    """verl's choice of the code that calls reward functions."""
    reward_kwargs: RewardKwargsConfig = field(default_factory=RewardKwargsConfig)
    """Settings of verl's `dapo` reward manager."""
    num_workers: int = 8
    """Samples scored at the same time."""
    timeout_s: float = 60.0
    """Longest time for one sample, in seconds; a slower one counts as a failure."""
    on_failure: Literal["raise", "zero"] = "raise"
    """A sample whose scoring fails, hangs or gives no finite number ends the run, or scores 0 (`reward/failed`)."""

    def check(self) -> None:
        at_least(self, 1, "num_workers")
        more_than(self, 0, "timeout_s")
