"""What is done to rewards once they are computed: sections `reward.reward_manager` and `reward.reward_kwargs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.checks import at_least
from mrl.config.errors import ConfigError
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class RewardManagerConfig(Section):
    """verl's choice of the code that calls reward functions."""

    name: Literal["naive", "dapo"] = "naive"
    """Accepted for compatibility; `reward.reward_kwargs.overlong_buffer_cfg.enable` alone turns DAPO's penalty on."""


@dataclass(kw_only=True, frozen=True)
class OverlongBufferConfig(Section):
    """DAPO's penalty on training responses close to the length limit."""

    enable: bool = False
    """Lower the rewards of long responses."""
    len: int = 0
    """Tokens before `max_resp_len` over which the penalty grows from 0."""
    penalty_factor: float = 0.0
    """The penalty at `max_resp_len`."""
    log: bool = False
    """Log the penalty, and the share of responses that have one, as `reward/overlong_reward` and `reward/overlong`."""

    def check(self) -> None:
        if self.enable and (self.len < 1 or self.penalty_factor <= 0):
            raise ConfigError(
                f"len = {self.len} and penalty_factor = {self.penalty_factor:g} must be positive for a penalty; set "
                "them (DAPO: 4096 and 1.0), or enable=False"
            )


@dataclass(kw_only=True, frozen=True)
class RewardKwargsConfig(Section):
    """Settings of verl's `dapo` reward manager."""

    max_resp_len: int | None = None
    """Response length at which the penalty is full; null is `data.max_response_length`."""
    overlong_buffer_cfg: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    """DAPO's penalty on training responses close to the length limit."""

    def check(self) -> None:
        at_least(self, 1, "max_resp_len")
