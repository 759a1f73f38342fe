"""DAPO's dynamic sampling: which prompts are worth training on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mrl.rewards.overlong import SCORE_KEY
from mrl.rewards.weighted import FAILED_KEY
from mrl.types import Sample

Group = list[Sample]
"""The samples of one prompt."""

_REWARD_METRICS = ("reward", "seq_reward", "seq_final_reward")
"""verl's names of the whole reward; the last is after a KL penalty, and refused where there is one."""
_SCORE_METRICS = ("acc", "score")
"""Its names of what a reward function gave, before the penalty on long responses."""


@dataclass(kw_only=True, frozen=True)
class GroupFilter:
    """Keeps the prompts whose responses differ: where all score the same, they say nothing about each other.

    Responses that could not be scored are not compared: an accident is no difference to learn from.

    Source: Yu et al., arXiv:2503.14476, "Dynamic Sampling" (eq. 11).
    """

    metric: str
    """What has to differ: the reward, or a number that the reward function returns beside it."""
    max_num_gen_batches: int
    """Generation batches in which a step has to be filled; at most 0 is no limit."""

    def split(self, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """Groups in which the metric differs, and the others.

        Raises:
            ValueError: a sample has no such metric.
        """
        values = [self._values(group) for group in groups]
        return (
            [group for group, found in zip(groups, values, strict=True) if len(found) > 1],
            [group for group, found in zip(groups, values, strict=True) if len(found) <= 1],
        )

    def check_limit(self, dropped: Sequence[Group], *, kept: int, needed: int, gen_batches: int) -> None:
        """Raise ValueError if no further generation batch may be drawn; says what was found in those so far."""
        if not 0 < self.max_num_gen_batches <= gen_batches:
            return
        common = Counter(value for group in dropped for value in self._values(group)).most_common(3)
        listed = ", ".join(f"{count} at {value:g}" for value, count in common) or "none of them could be scored"
        raise ValueError(
            f"{gen_batches} generation batches (algorithm.filter_groups.max_num_gen_batches) filled {kept} of the "
            f"{needed} prompts of a step: for {len(dropped)} of {len(dropped) + kept} prompts all responses had the "
            f"same {self.metric} ({listed}). Choose easier prompts if that is the lowest value, harder ones if it is "
            "the highest, or raise actor_rollout_ref.rollout.n, data.gen_batch_size or max_num_gen_batches (0 is no "
            "limit)"
        )

    def _values(self, group: Group) -> set[float]:
        return {read_metric(sample, self.metric) for sample in group if not sample.reward_info.get(FAILED_KEY)}


def read_metric(sample: Sample, metric: str) -> float:
    """The number by which a sample is compared with the others of its prompt.

    Raises:
        ValueError: its reward function returned no such number.
    """
    info = sample.reward_info
    if metric in info:
        return info[metric]
    assert sample.reward is not None, "samples are scored before they are filtered"
    if metric in _REWARD_METRICS:
        return sample.reward
    if metric in _SCORE_METRICS:
        return info.get(SCORE_KEY, sample.reward)
    raise ValueError(
        f"algorithm.filter_groups.metric = {metric}, but the reward of sample {sample.prompt.uid} has no such part; "
        f"there are {', '.join(sorted({'reward', 'score', *info}))}"
    )
