"""From prompts to scored samples: the part of a step in which the engines have the devices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mrl.data.loader import PromptLoader
from mrl.interfaces import Rollout
from mrl.observability.timers import PhaseTimer
from mrl.rewards.overlong import OverlongPenalty
from mrl.trainer.group_filter import Group, GroupFilter
from mrl.trainer.scoring import Scorer
from mrl.types import Prompt, Sample, SamplingParams

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(kw_only=True)
class SampleCollector:
    """Generates and scores the samples of a step. Called by all ranks."""

    prompts: PromptLoader
    rollout: Rollout
    scorer: Scorer
    sampling: SamplingParams
    n_samples_per_prompt: int
    n_prompts: int
    """Prompts of a step; the loader's batches are of that size, or of any with a filter."""
    group_filter: GroupFilter | None = None
    """Has further prompts drawn in place of those whose responses all score the same; None keeps every prompt."""
    overlong_penalty: OverlongPenalty | None = None
    baseline_sampling: SamplingParams | None = None
    """How the response that a prompt's samples are compared with is drawn; None generates none."""

    def collect(self, timer: PhaseTimer) -> tuple[list[Sample], Metrics]:
        """Scored samples of the next prompts, those of one prompt side by side, and `rollout/*`.

        Raises:
            ValueError: the filter left too few prompts in as many generation batches as it may take.
        """
        tally = _Tally()
        groups = self._generate_groups(timer, tally)
        if self.group_filter is not None:
            groups = self._fill_up(groups, self.group_filter, timer, tally)
        if self.baseline_sampling is not None:
            groups = self._add_baselines(groups, self.baseline_sampling, timer, tally)
        metrics = merge_rollouts(tally.rollouts) | self._count(tally)
        return [sample for group in groups for sample in group], metrics

    def _fill_up(self, new: list[Group], group_filter: GroupFilter, timer: PhaseTimer, tally: _Tally) -> list[Group]:
        """As many groups that the filter keeps as a step takes, from this generation batch and as many more as needed.

        Groups beyond that are dropped: in the next step they would be of older weights.
        """
        kept: list[Group] = []
        while True:
            chosen, dropped = group_filter.split(new)
            kept += chosen
            tally.dropped += dropped
            if len(kept) >= self.n_prompts:
                return kept[: self.n_prompts]
            group_filter.check_limit(
                tally.dropped, kept=len(kept), needed=self.n_prompts, gen_batches=tally.gen_batches
            )
            logger.info("generation batch %d: %d of %d prompts filled", tally.gen_batches, len(kept), self.n_prompts)
            new = self._generate_groups(timer, tally)

    def _generate_groups(self, timer: PhaseTimer, tally: _Tally) -> list[Group]:
        """The next batch of prompts with their responses, scored."""
        n, prompts = self.n_samples_per_prompt, next(self.prompts)
        samples = self._respond([prompt for prompt in prompts for _ in range(n)], self.sampling, timer, tally)
        groups = [samples[first : first + n] for first in range(0, len(samples), n)]
        tally.gen_batches += 1
        tally.groups += groups
        return groups

    def _add_baselines(
        self, groups: list[Group], sampling: SamplingParams, timer: PhaseTimer, tally: _Tally
    ) -> list[Group]:
        baselines = self._respond([group[0].prompt for group in groups], sampling, timer, tally)
        return [
            [replace(sample, baseline=baseline.reward) for sample in group]
            for group, baseline in zip(groups, baselines, strict=True)
        ]

    def _respond(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, timer: PhaseTimer, tally: _Tally
    ) -> list[Sample]:
        """One scored sample for each prompt."""
        with timer("rollout"):
            samples = self.rollout.generate(prompts, sampling)
        tally.rollouts.append(dict(self.rollout.metrics))
        with timer("reward"):
            samples = self.scorer.score(samples)
        return self.overlong_penalty.apply(samples) if self.overlong_penalty else samples

    def _count(self, tally: _Tally) -> Metrics:
        metrics: Metrics = {}
        if self.n_samples_per_prompt > 1:
            metrics["rollout/zero_variance_fraction"] = zero_variance_fraction(tally.groups)
        if self.group_filter is not None:
            rewards = [sample.reward or 0.0 for group in tally.groups for sample in group]
            metrics |= {
                "rollout/gen_batches": float(tally.gen_batches),
                "rollout/groups_generated": float(len(tally.groups)),
                "rollout/groups_dropped": float(len(tally.dropped)),
                "rollout/groups_surplus": float(len(tally.groups) - len(tally.dropped) - self.n_prompts),
                "reward/generated_mean": sum(rewards) / len(rewards),
            }
        return metrics


def zero_variance_fraction(groups: Sequence[Group]) -> float:
    """Share of prompts whose responses all have the same reward."""
    return sum(len({sample.reward for sample in group}) == 1 for group in groups) / len(groups)


@dataclass
class _Tally:
    """What a step has generated so far, whatever becomes of it."""

    gen_batches: int = 0
    groups: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    rollouts: list[Metrics] = field(default_factory=list)
    """The metrics of each call to the engines."""


def merge_rollouts(rollouts: Sequence[Metrics]) -> Metrics:
    """Several calls to the engines as one: tokens and seconds add up, and the rate is that of all tokens."""
    if len(rollouts) == 1:
        return dict(rollouts[0])
    rate = "rollout/tokens_per_s"
    total = {key: sum(metrics[key] for metrics in rollouts) for key in rollouts[0]}
    if rate in total:
        seconds = sum(metrics["rollout/tokens"] / metrics[rate] for metrics in rollouts)
        total[rate] = total["rollout/tokens"] / seconds
    return total
