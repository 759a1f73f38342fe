"""Settings of scoring: section `reward`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, finite, more_than
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.judge import JudgeConfig
from mrl.config.reward_model import RewardModelConfig
from mrl.config.reward_shaping import RewardKwargsConfig, RewardManagerConfig
from mrl.config.section import Section, field_types

OnFailure = Literal["zero", "raise"]
Verifier = Literal["embedded", "exact_match", "gsm8k", "json_schema", "math_verify", "reasoning_gym"]

_RESERVED_NAMES = ("mean", "min", "max", "failed", "overlong", "overlong_reward", "judge", "reward_model")
"""`reward/<name>` of these is something else."""


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
class RewardFunctionConfig(Section):
    """One of several weighted rewards: the value of an entry of `reward.functions`."""

    path: str | None = None
    """Python file; null takes a built-in verifier."""
    name: str = "compute_score"
    """Function in that file."""
    verifier: Verifier | None = None
    """Built-in verifier for all samples; null takes that of each sample's data source."""
    reward_kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Keyword arguments added to every call."""
    weight: float = 1.0
    """Factor of the score in the sum."""
    timeout_s: float | None = None
    """Longest time for one sample, in seconds; null is `reward.timeout_s`."""
    on_failure: OnFailure | None = None
    """What a sample that cannot be scored costs; null is `reward.on_failure`."""

    def check(self) -> None:
        more_than(self, 0, "timeout_s")
        finite(self, "weight")
        if self.path is not None and self.verifier is not None:
            raise ConfigError(f"path = {self.path} and verifier = {self.verifier} are both set; keep one")
        if self.path is None and self.name != "compute_score":
            raise ConfigError(f"name = {self.name} is a function of a file, but path is null; set it, or drop name")


@dataclass(kw_only=True, frozen=True)
class RewardConfig(Section):
    """How samples are scored."""

    custom_reward_function: CustomRewardFunctionConfig = field(default_factory=CustomRewardFunctionConfig)
    """A reward function from a file."""
    reward_manager: RewardManagerConfig = field(default_factory=RewardManagerConfig)
    """verl's choice of the code that calls reward functions."""
    reward_kwargs: RewardKwargsConfig = field(default_factory=RewardKwargsConfig)
    """Settings of verl's `dapo` reward manager."""
    functions: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Several rewards, by name, in place of the one: each is logged as `reward/<name>`, and a sample's reward is the
    sum of their scores times `weight` (1.0). An entry has `path` and `name` (compute_score) of a function, or a
    `verifier` for all samples, or none of them for the verifier of each sample's data source; and `reward_kwargs`,
    `timeout_s`, `on_failure`."""
    verifiers: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Built-in verifier by data source (shell patterns such as `math_*` too): embedded, exact_match, gsm8k,
    json_schema, math_verify or reasoning_gym, or a mapping with its `name` and its arguments."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """A classifier that scores samples, besides `functions` or alone."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """A language model that scores samples, besides `functions` or alone."""
    num_workers: int = 8
    """Samples scored at the same time; several functions share them."""
    timeout_s: float = 60.0
    """Longest time for one sample, in seconds; a slower one counts as a failure."""
    sandbox: bool = False
    """Call functions and verifiers without network, in a process that sees no other; the kernel has to permit user
    namespaces (docs/security.md)."""
    pass_environment: tuple[str, ...] = ()
    """Environment variables for functions that would be withheld: the cluster's, and those named like secrets."""
    on_failure: OnFailure = "zero"
    """A sample whose scoring fails, hangs or gives no finite number scores 0 (`reward/failed`), or ends the run. Where
    16 or more samples are scored and every one fails, the run ends in either case."""

    @property
    def uses_model(self) -> bool:
        """Whether a judge or a reward model scores."""
        return self.judge.url is not None or self.reward_model.enable

    @property
    def parts(self) -> Mapping[str, RewardFunctionConfig]:
        """The functions that score, by name; one alone that needs none has an empty name.

        A judge or a reward model takes the place of the verifiers unless `functions` ask for them.
        """
        if self.functions:
            return {name: _build_function(name, values) for name, values in self.functions.items()}
        custom = self.custom_reward_function
        if custom.path is None:
            return {} if self.uses_model else {"": RewardFunctionConfig()}
        name = "custom" if self.uses_model else ""
        return {name: RewardFunctionConfig(path=custom.path, name=custom.name, reward_kwargs=custom.reward_kwargs)}

    def check(self) -> None:
        at_least(self, 1, "num_workers")
        more_than(self, 0, "timeout_s")
        if self.functions and self.custom_reward_function.path is not None:
            raise ConfigError(
                f"custom_reward_function.path = {self.custom_reward_function.path} and functions = "
                f"{', '.join(self.functions)} are both set; move the function into reward.functions"
            )
        weights = [part.weight for part in self.parts.values()]
        weights += [self.judge.weight] if self.judge.url is not None else []
        weights += [self.reward_model.weight] if self.reward_model.enable else []
        if not any(weights):
            raise ConfigError("every weight is 0, so every reward would be; set one to another number")


def _build_function(name: str, values: Any) -> RewardFunctionConfig:
    if not re.fullmatch(r"[\w.-]+", name) or name in _RESERVED_NAMES:
        raise ConfigError(
            f"functions: {name!r} cannot name a reward; use letters, digits, '_', '-' and '.', and none of "
            f"{', '.join(_RESERVED_NAMES)}, which are names of other things"
        )
    if not isinstance(values, Mapping):
        raise ConfigError(f"functions.{name} = {values!r} is a section; set the keys inside it")
    known = field_types(RewardFunctionConfig)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"functions.{name}.{unknown[0]} does not exist; there are {', '.join(known)}")
    try:
        return RewardFunctionConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"functions.{name}.{error}") from None
