"""From section `reward` to what scores samples, and its checks before any rank starts."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mrl.config.frozen import thaw
from mrl.config.reward import RewardConfig, RewardFunctionConfig
from mrl.rewards import rules
from mrl.rewards.function import FunctionReward
from mrl.rewards.part import RewardPart
from mrl.rewards.weighted import WeightedReward


def check_rewards(settings: RewardConfig, data_sources: Collection[str]) -> None:
    """Check what can be checked without starting anything.

    Raises:
        ValueError: a file that does not exist, an unknown verifier or argument, a data source without a verifier.
    """
    rules.check_verifiers(thaw(settings.verifiers))
    for name, part in settings.parts.items():
        try:
            _check_part(settings, part, data_sources)
        except ValueError as error:
            key = f"reward.functions.{name}" if name else "reward"
            raise ValueError(f"{key}: {error}") from error


def build_reward(settings: RewardConfig) -> WeightedReward:
    """The reward function of the run; it has started what it needs to load functions from files.

    Raises:
        ValueError: a file does not import or lacks its function.
    """
    cores, configured = os.cpu_count() or 1, settings.parts
    num_workers = max(1, min(settings.num_workers, cores) // len(configured))
    parts: list[RewardPart] = []
    with ExitStack() as on_error:
        for name, part in configured.items():
            scorer = FunctionReward(
                path=part.path,
                name=part.name,
                kwargs=_arguments(settings, part),
                num_workers=num_workers,
                timeout_s=part.timeout_s or settings.timeout_s,
            )
            on_error.callback(scorer.close)
            scorer.check_function()
            on_failure = part.on_failure or settings.on_failure
            parts.append(RewardPart(name=name, scorer=scorer, weight=part.weight, on_failure=on_failure))
        on_error.pop_all()
    return WeightedReward(parts)


def _check_part(settings: RewardConfig, part: RewardFunctionConfig, data_sources: Collection[str]) -> None:
    if part.path is not None:
        if not Path(part.path).expanduser().is_file():
            raise ValueError(f"path = {part.path} does not exist; give a Python file")
    elif part.verifier is not None:
        rules.check_choice(rules.Choice(part.verifier, thaw(part.reward_kwargs)))
    else:
        rules.check_data_sources(data_sources, thaw(settings.verifiers))
        for source in sorted(data_sources):
            rules.check_choice(rules.choose(source, **_arguments(settings, part)))


def _arguments(settings: RewardConfig, part: RewardFunctionConfig) -> dict[str, Any]:
    """Keyword arguments of every call."""
    arguments = thaw(part.reward_kwargs)
    if part.path is not None:
        return arguments
    routing = {"verifier": part.verifier} if part.verifier else {"verifiers": thaw(settings.verifiers)}
    return {**arguments, **routing}
