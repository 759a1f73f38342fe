"""The reward of a run: a weighted sum of parts, computed at the same time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from mrl.interfaces import RewardError
from mrl.rewards.messages import Outcome
from mrl.rewards.part import RewardPart
from mrl.rewards.pool import SKIPPED
from mrl.types import Sample

logger = logging.getLogger(__name__)

FAILED_KEY = "failed"
_NO_ACCIDENT = 16
"""Where so many samples fail and none does not, scoring is broken, and zeros for all would teach nothing."""


class WeightedReward:
    """A RewardFn; close it, or use it as a context manager.

    A sample's `reward_info` holds the unweighted score of every named part, what the part reported besides it (under
    `<part>/<key>`, or `<key>` for an unnamed part), and 1 or 0 for whether a part could not score the sample, under
    `failed` and `<part>/failed`, where that does not end the run.
    """

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        self._parts = list(parts)

    def __call__(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        """Reward and named parts of each sample, in order. Safe to call from several threads.

        Raises:
            ValueError: a data source has no verifier.
            RewardError: a sample could not be scored by a part whose failures end the run.
        """
        outcomes = self._score_parts(samples)
        for part, of_part in zip(self._parts, outcomes, strict=True):
            _report_failures(part, samples, of_part)
        return [self._sum([of_part[index] for of_part in outcomes]) for index in range(len(samples))]

    def _score_parts(self, samples: Sequence[Sample]) -> list[list[Outcome]]:
        executor = ThreadPoolExecutor(max(1, len(self._parts)), thread_name_prefix="reward_part")
        try:
            futures = [
                executor.submit(part.scorer.score, samples, stop_at_failure=part.on_failure == "raise")
                for part in self._parts
            ]
            return [future.result() for future in futures]
        finally:
            # After an error, the other parts' results are of no use to anybody.
            executor.shutdown(wait=False, cancel_futures=True)

    def _sum(self, outcomes: Sequence[Outcome]) -> tuple[float, dict[str, float]]:
        """Reward and info of one sample from the outcome of every part."""
        reward, failed = 0.0, False
        info: dict[str, float] = {}
        for part, outcome in zip(self._parts, outcomes, strict=True):
            reward += part.weight * outcome.score
            prefix = f"{part.name}/" if part.name else ""
            info |= {f"{prefix}{key}": value for key, value in outcome.parts.items()}
            if part.name:
                info[part.name] = outcome.score
                if part.on_failure == "zero":
                    info[f"{prefix}{FAILED_KEY}"] = float(outcome.error is not None)
            failed |= outcome.error is not None
        if any(part.on_failure == "zero" for part in self._parts):
            info[FAILED_KEY] = float(failed)
        return reward, info

    def close(self) -> None:
        """Stop what the parts have started; idempotent."""
        for part in self._parts:
            part.scorer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _report_failures(part: RewardPart, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    failures = [index for index, outcome in enumerate(outcomes) if outcome.error and outcome is not SKIPPED]
    if not failures:
        return
    prompt = samples[failures[0]].prompt
    what = f"the reward {part.name!r}" if part.name else "the reward"
    first = f"{what} of sample {prompt.uid!r} (data_source {prompt.data_source!r}) {outcomes[failures[0]].error}"
    if part.on_failure == "raise":
        raise RewardError(f"{first}. Mend what scores it, or have failures score 0 with on_failure=zero")
    if len(failures) == len(samples) >= _NO_ACCIDENT:
        raise RewardError(f"none of {len(samples)} samples could be scored, first: {first}. Mend what scores them")
    level = logging.ERROR if len(failures) == len(samples) else logging.WARNING
    logger.log(level, "%d of %d samples could not be scored: score 0; first: %s", len(failures), len(samples), first)
