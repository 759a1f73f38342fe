"""The reward function of a run: built-in verifiers or a function from a file, run in worker processes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from mrl.interfaces import RewardError
from mrl.rewards import rules
from mrl.rewards.pool import SKIPPED, WorkerPool
from mrl.rewards.worker import FunctionSpec, Item, Outcome
from mrl.types import Sample

logger = logging.getLogger(__name__)

OnFailure = Literal["raise", "zero"]
"""A sample that cannot be scored ends the run, or scores 0 and is counted as `reward/failed`."""

FAILED_KEY = "reward/failed"
_MAX_WORKERS = 8


def build_reward_fn(
    *,
    path: str | None = None,
    name: str = "compute_score",
    reward_kwargs: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
    timeout_s: float = 60.0,
    on_failure: OnFailure = "raise",
) -> ConcurrentReward:
    """A RewardFn that calls a function from a Python file or, without `path`, the built-in verifiers.

    The function has verl's signature, `name(data_source, solution_str, ground_truth, extra_info, **reward_kwargs)`,
    may be a coroutine function, and returns a number or a mapping with "score"; other numbers in the mapping become
    the sample's `reward_info`.

    Args:
        num_workers: processes; None is the number of cores, at most 8.
        timeout_s: wall-clock limit for one sample. Importing files and libraries is not counted.

    Raises:
        ValueError: an argument is out of range, the file is missing or does not import, or has no such function.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers = {num_workers} must be at least 1")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s = {timeout_s} must be a positive number of seconds")
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure = {on_failure!r} must be one of {', '.join(get_args(OnFailure))}")
    if path is not None:
        path = str(Path(path).expanduser().resolve())
    spec = FunctionSpec(path=path, name=name, kwargs=dict(reward_kwargs or {}))
    workers = num_workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    reward = ConcurrentReward(spec, num_workers=workers, timeout_s=timeout_s, on_failure=on_failure)
    if path is not None:
        try:
            reward.check_function()
        except BaseException:
            reward.close()
            raise
    return reward


class ConcurrentReward:
    """A RewardFn over a pool of worker processes; close it, or use it as a context manager."""

    def __init__(self, spec: FunctionSpec, *, num_workers: int, timeout_s: float, on_failure: OnFailure) -> None:
        self._is_built_in = spec.path is None
        self._on_failure = on_failure
        self._pool = WorkerPool(spec, num_workers=num_workers, timeout_s=timeout_s)

    def check_function(self) -> None:
        """Raise ValueError if the function cannot be loaded."""
        self._pool.check_function()

    def check_data_sources(self, names: Collection[str]) -> None:
        """Raise ValueError if built-in verifiers are to score and one of these data sources has none."""
        if self._is_built_in:
            rules.check_data_sources(names)

    def __call__(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        """Reward and named parts of each sample, in order. Safe to call from several threads.

        Raises:
            ValueError: a data source has no verifier.
            RewardError: a sample could not be scored, and failures are not set to score 0.
        """
        self.check_data_sources({sample.prompt.data_source for sample in samples})
        outcomes = self._pool.score(
            [_build_item(sample) for sample in samples], stop_at_failure=self._on_failure == "raise"
        )
        failures = [index for index, outcome in enumerate(outcomes) if outcome.error and outcome is not SKIPPED]
        if failures:
            self._report(failures, samples, outcomes)
        return [(outcome.score, self._count(outcome)) for outcome in outcomes]

    def _report(self, failures: list[int], samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
        message = _describe_failure(samples[failures[0]], outcomes[failures[0]])
        if self._on_failure == "raise":
            raise RewardError(f"{message}. Mend the reward function, or have failures score 0 instead")
        logger.warning("%d of %d samples could not be scored: score 0; first: %s", len(failures), len(samples), message)

    def _count(self, outcome: Outcome) -> dict[str, float]:
        if self._on_failure == "raise":
            return outcome.parts
        return {**outcome.parts, FAILED_KEY: float(outcome.error is not None)}

    def close(self) -> None:
        """End the worker processes; idempotent."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _build_item(sample: Sample) -> Item:
    prompt = sample.prompt
    return Item(prompt.data_source, sample.response_text, prompt.ground_truth, prompt.extra_info)


def _describe_failure(sample: Sample, outcome: Outcome) -> str:
    return f"the reward of sample {sample.prompt.uid!r} (data_source {sample.prompt.data_source!r}) {outcome.error}"
