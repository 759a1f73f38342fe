"""From prompts to scored samples: the part of a step in which the engines have the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrl.data.loader import PromptLoader
from mrl.interfaces import Rollout
from mrl.observability.timers import PhaseTimer
from mrl.trainer.scoring import Scorer
from mrl.types import Prompt, Sample, SamplingParams

Metrics = dict[str, float]


@dataclass(kw_only=True)
class SampleCollector:
    """Generates and scores the samples of a step. Called by all ranks."""

    prompts: PromptLoader
    rollout: Rollout
    scorer: Scorer
    sampling: SamplingParams
    n_samples_per_prompt: int

    def collect(self, timer: PhaseTimer) -> tuple[list[Sample], Metrics]:
        """Scored samples of the next prompts, those of one prompt side by side, and `rollout/*`."""
        samples, metrics = self._roll_out(next(self.prompts), timer)
        with timer("reward"):
            return self.scorer.score(samples), metrics

    def _roll_out(self, prompts: Sequence[Prompt], timer: PhaseTimer) -> tuple[list[Sample], Metrics]:
        repeated = [prompt for prompt in prompts for _ in range(self.n_samples_per_prompt)]
        with timer("rollout"):
            samples = self.rollout.generate(repeated, self.sampling)
        return samples, dict(self.rollout.metrics)
