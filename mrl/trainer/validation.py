"""Validation: the whole validation set, sampled as `rollout.val_kwargs` say."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrl.interfaces import Rollout
from mrl.trainer.samples import SampleWriter, summarize_samples
from mrl.trainer.scoring import Scorer
from mrl.types import Prompt, Sample, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Validator:
    """Generates and scores the validation prompts; empty without validation data."""

    prompts: Sequence[Prompt]
    batch_size: int | None
    """Prompts generated at a time; None is all of them."""
    rollout: Rollout
    scorer: Scorer
    sampling: SamplingParams
    n_samples_per_prompt: int
    sample_writer: SampleWriter
    num_logged: int
    """Samples shown in the log."""
    add_model_scores: Callable[[list[Sample]], list[Sample]] | None = None
    """Adds a reward model's scores while the engines have the devices; None without such a model."""

    def run(self, *, step: int) -> dict[str, float]:
        """`val/*` metrics: reward over all samples and per data source, best of n, seconds. Called by all ranks."""
        start = time.perf_counter()
        if not self.prompts:
            return {}
        size = self.batch_size or len(self.prompts)
        batches = [self.prompts[first : first + size] for first in range(0, len(self.prompts), size)]
        samples = [sample for batch in batches for sample in self._sample(batch)]
        if self.add_model_scores is not None:
            samples = self.add_model_scores(samples)
        self.sample_writer.write(samples, step=step)
        for sample in samples[: self.num_logged]:
            logger.info("validation sample %s: %r, reward %s", sample.prompt.uid, sample.response_text, sample.reward)
        summary = summarize_samples(samples)
        return {
            "val/reward_mean": summary["reward/mean"],
            "val/response_length_mean": summary["response/length_mean"],
            **self._best_of_n(samples),
            **_per_source(samples),
            "time/validation_s": time.perf_counter() - start,
        }

    def _sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        repeated = [prompt for prompt in prompts for _ in range(self.n_samples_per_prompt)]
        return self.scorer.score(self.rollout.generate(repeated, self.sampling))

    def _best_of_n(self, samples: list[Sample]) -> dict[str, float]:
        n = self.n_samples_per_prompt
        if n == 1:
            return {}
        best = [max(s.reward or 0.0 for s in samples[i : i + n]) for i in range(0, len(samples), n)]
        return {f"val/reward_best_of_{n}": sum(best) / len(best)}


def _per_source(samples: list[Sample]) -> dict[str, float]:
    by_source: dict[str, list[float]] = {}
    for sample in samples:
        by_source.setdefault(sample.prompt.data_source, []).append(sample.reward or 0.0)
    if len(by_source) < 2:
        return {}
    return {f"val/{source}/reward_mean": sum(rewards) / len(rewards) for source, rewards in by_source.items()}
