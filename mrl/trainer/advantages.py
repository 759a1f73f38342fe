"""From scores to advantages: KL penalty, estimator, and what they report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.advantages import compute_explained_variance, compute_token_rewards
from mrl.algorithms.estimators import AdvantageInputs, Estimator
from mrl.algorithms.kl import KLController, apply_kl_penalty, compute_kl
from mrl.algorithms.masking import masked_mean
from mrl.types import Sample, TrainBatch

Metrics = dict[str, float]


@dataclass(kw_only=True)
class AdvantageStage:
    """Fills in rewards, advantages and returns. Called by all ranks with the same global batch."""

    estimator: Estimator
    kl_penalty: str
    """Estimator of the KL to the reference."""
    kl_controller: KLController | None
    """Weight of the KL penalty in the rewards; None subtracts none."""

    def compute(self, batch: TrainBatch, samples: Sequence[Sample]) -> tuple[TrainBatch, Metrics]:
        """`batch` with rewards, advantages and returns set; its log-probs and, with a critic, values are set."""
        rewards, metrics = self._token_rewards(batch, samples)
        inputs = AdvantageInputs(
            rewards=rewards, loss_mask=batch.loss_mask, groups=group_numbers(samples), values=batch.values
        )
        advantages, returns = self.estimator(inputs)
        mask = batch.loss_mask
        metrics |= {
            "advantage/mean": float(masked_mean(advantages, mask)),
            "advantage/abs_mean": float(masked_mean(advantages.abs(), mask)),
        }
        if batch.values is not None:
            metrics |= {
                "critic/explained_variance": float(compute_explained_variance(batch.values, returns, mask)),
                "critic/return_mean": float(masked_mean(returns, mask)),
            }
        return batch.with_fields(rewards=rewards, advantages=advantages, returns=returns), metrics

    def _token_rewards(self, batch: TrainBatch, samples: Sequence[Sample]) -> tuple[Tensor, Metrics]:
        """Each sample's score on its last token, minus the KL penalty if configured. [B, T] float32."""
        scores = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
        rewards, mask = compute_token_rewards(scores, batch.loss_mask), batch.loss_mask
        if batch.ref_log_probs is None:
            return rewards, {}
        old_log_probs, ref_log_probs = batch.required("old_log_probs"), batch.ref_log_probs
        kl = compute_kl(old_log_probs, ref_log_probs, kind=self.kl_penalty)
        metrics = {"actor/ref_kl": float(masked_mean(kl, mask))}
        if self.kl_controller is None:
            return rewards, metrics
        kl_coef = self.kl_controller.kl_coef
        rewards, current_kl = apply_kl_penalty(
            rewards, old_log_probs, ref_log_probs, mask, kl_coef=kl_coef, kind=self.kl_penalty
        )
        self.kl_controller.update(current_kl, n_steps=len(batch))
        return rewards, {**metrics, "actor/reward_kl": current_kl, "actor/reward_kl_coef": kl_coef}


def group_numbers(samples: Sequence[Sample]) -> Tensor:
    """[B] int64: equal for samples of one prompt, numbered in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(sample.prompt.uid, len(numbers)) for sample in samples])
