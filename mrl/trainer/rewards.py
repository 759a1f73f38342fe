"""From section `reward` to what scores samples, and its checks before any rank starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mrl.config.frozen import thaw
from mrl.config.reward import RewardConfig, RewardFunctionConfig
from mrl.rewards import json_schema, rules
from mrl.rewards.function import FunctionReward
from mrl.rewards.judge import JudgeReward, JudgeSettings, ScoreFormat, find_model
from mrl.rewards.part import RewardPart
from mrl.rewards.sandbox import check_permitted, clean_environment
from mrl.rewards.weighted import WeightedReward

logger = logging.getLogger(__name__)


def check_rewards(settings: RewardConfig, data_sources: Collection[str]) -> None:
    """Check what can be checked without starting anything; a judge has to answer.

    Raises:
        ValueError: a file that does not exist, an unknown verifier or argument, a data source without a verifier, a
            judge that does not answer or is another model, a sandbox that this host does not permit.
    """
    rules.check_verifiers(thaw(settings.verifiers))
    if settings.sandbox and settings.parts:
        check_permitted()
    withheld = os.environ.keys() - clean_environment(os.environ, settings.pass_environment)
    if withheld and any(part.path for part in settings.parts.values()):
        logger.info("reward functions run without %s (reward.pass_environment)", ", ".join(sorted(withheld)))
    for name, part in settings.parts.items():
        try:
            _check_part(settings, part, data_sources)
        except ValueError as error:
            key = f"reward.functions.{name}" if name else "reward"
            raise ValueError(f"{key}: {error}") from error
    if settings.judge.url is not None:
        judge = judge_settings(settings)
        if judge.score.schema is not None:
            json_schema.check_schema(judge.score.schema)
        find_model(judge)


def build_reward(settings: RewardConfig) -> WeightedReward:
    """The reward function of the run; it has started what it needs to load functions from files.

    Raises:
        ValueError: a file does not import or lacks its function.
    """
    with ExitStack() as on_error:
        parts = [*_function_parts(settings, on_error), *_judge_parts(settings)]
        on_error.pop_all()
    return WeightedReward(parts)


def _function_parts(settings: RewardConfig, on_error: ExitStack) -> Iterator[RewardPart]:
    cores, configured = os.cpu_count() or 1, settings.parts
    num_workers = max(1, min(settings.num_workers, cores) // max(1, len(configured)))
    for name, part in configured.items():
        scorer = FunctionReward(
            path=part.path,
            name=part.name,
            kwargs=_arguments(settings, part),
            num_workers=num_workers,
            timeout_s=part.timeout_s or settings.timeout_s,
            sandbox=settings.sandbox,
            pass_environment=settings.pass_environment,
        )
        on_error.callback(scorer.close)
        scorer.check_function()
        on_failure = part.on_failure or settings.on_failure
        yield RewardPart(name=name, scorer=scorer, weight=part.weight, on_failure=on_failure)


def _judge_parts(settings: RewardConfig) -> Iterator[RewardPart]:
    judge = settings.judge
    if judge.url is not None:
        scorer = JudgeReward(judge_settings(settings))
        on_failure = judge.on_failure or settings.on_failure
        yield RewardPart(name="judge", scorer=scorer, weight=judge.weight, on_failure=on_failure)


def judge_settings(settings: RewardConfig) -> JudgeSettings:
    """What the judge is asked, and how its answers are read."""
    judge = settings.judge
    assert judge.url is not None, "this run has no judge"
    return JudgeSettings(
        url=judge.url,
        model=judge.model,
        api_key_env=judge.api_key_env,
        system_prompt=judge.system_prompt,
        prompt_template=judge.prompt_template,
        score=ScoreFormat(
            regex=judge.score_regex,
            schema=thaw(judge.score_schema) or None,
            minimum=judge.min_score,
            maximum=judge.max_score,
        ),
        max_new_tokens=judge.max_new_tokens,
        temperature=judge.temperature,
        request_kwargs=thaw(judge.request_kwargs),
        max_concurrent=judge.max_concurrent,
        max_retries=judge.max_retries,
        timeout_s=judge.timeout_s or settings.timeout_s,
    )


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
