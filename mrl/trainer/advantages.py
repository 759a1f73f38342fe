"""From scores to advantages: KL penalty, estimator, and what they report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.advantages import compute_token_rewards, explained_variance
from mrl.algorithms.estimators import AdvantageInputs, Estimator
from mrl.algorithms.kl import KLController, compute_mean_kl, subtract_kl_
from mrl.algorithms.masking import compute_means, compute_moments_and_difference
from mrl.types import Sample, TrainBatch

Metrics = dict[str, float]


@dataclass(kw_only=True)
class AdvantageStage:
    """Fills in advantages and returns. Called by all ranks with the same global batch."""

    estimator: Estimator
    kl_penalty: str
    """Estimator of the KL to the reference."""
    kl_controller: KLController | None
    """Weight of the KL penalty in the rewards; None subtracts none."""
    n_samples_per_prompt: int
    """Samples side by side that are one prompt's."""

    def compute(self, batch: TrainBatch, samples: Sequence[Sample]) -> tuple[TrainBatch, Metrics]:
        """`batch` with advantages and returns set; its log-probs and, with a critic, values are set."""
        rewards, metrics = self._token_rewards(batch, samples)
        inputs = AdvantageInputs(
            rewards=rewards,
            loss_mask=batch.loss_mask,
            groups=group_numbers(samples, self.n_samples_per_prompt),
            values=batch.values,
            baselines=_baselines(samples),
        )
        advantages, returns = self.estimator(inputs)
        mask = batch.loss_mask
        mean, abs_mean = compute_means(advantages, mask)
        metrics |= {"advantage/mean": mean, "advantage/abs_mean": abs_mean}
        if batch.values is not None:
            fit = compute_moments_and_difference(returns, batch.values, mask)
            metrics |= {"critic/explained_variance": explained_variance(*fit), "critic/return_mean": fit[0].mean}
        return batch.with_fields(advantages=advantages, returns=returns), metrics

    def _token_rewards(self, batch: TrainBatch, samples: Sequence[Sample]) -> tuple[Tensor, Metrics]:
        """Each sample's score on its last token, minus the KL penalty if configured. [B, T] float32."""
        scores = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
        rewards, mask = compute_token_rewards(scores, batch.loss_mask), batch.loss_mask
        if batch.ref_log_probs is None:
            return rewards, {}
        old_log_probs, ref_log_probs = batch.required("old_log_probs"), batch.ref_log_probs
        if self.kl_controller is None:
            kl = compute_mean_kl(old_log_probs, ref_log_probs, mask, self.kl_penalty)
            return rewards, {"actor/ref_kl": kl.over_tokens}
        kl_coef = self.kl_controller.kl_coef
        kl = subtract_kl_(rewards, old_log_probs, ref_log_probs, mask, kl_coef=kl_coef, kind=self.kl_penalty)
        self.kl_controller.update(kl.over_samples, n_steps=len(batch))
        return rewards, {
            "actor/ref_kl": kl.over_tokens,
            "actor/reward_kl": kl.over_samples,
            "actor/reward_kl_coef": kl_coef,
        }


def group_numbers(samples: Sequence[Sample], n_samples_per_prompt: int) -> Tensor:
    """[B] int64: equal for the samples of one prompt, which are side by side.

    Not by `Prompt.uid`: a step that draws further prompts can cross into the next epoch and meet a prompt again.
    """
    uids = [sample.prompt.uid for sample in samples]
    groups = [uids[first : first + n_samples_per_prompt] for first in range(0, len(uids), n_samples_per_prompt)]
    assert all(len(set(group)) == 1 and len(group) == n_samples_per_prompt for group in groups), "groups are mixed up"
    return torch.arange(len(groups)).repeat_interleave(n_samples_per_prompt)


def _baselines(samples: Sequence[Sample]) -> Tensor | None:
    """[B] float32, the greedy responses' rewards where they were generated."""
    baselines = [sample.baseline for sample in samples if sample.baseline is not None]
    return torch.tensor(baselines, dtype=torch.float32) if len(baselines) == len(samples) else None
