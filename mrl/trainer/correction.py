"""Rollout correction of a step's batch, and how far trainer and engine are apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from mrl.algorithms.rollout_correction import RolloutCorrection, compute_mismatch, correction_metrics
from mrl.types import TrainBatch

Metrics = dict[str, float]


@dataclass(kw_only=True, frozen=True)
class CorrectionStage:
    """Fills in rollout_is_weights and accepted. Called by all ranks with the same global batch."""

    correction: RolloutCorrection = field(default_factory=RolloutCorrection)
    """Without weights and rejections the mismatch is only reported."""
    bypass_mode: bool = False
    """The engine's log-probs are the old ones, so that there is nothing to compare here: the actor's objective does it
    with the log-probs in training."""

    def compute(self, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
        """`batch` with what the correction makes of its old log-probs, and `parity/*` and `rollout_corr/*` over all
        trained tokens of the step, rejected or not."""
        if self.bypass_mode:
            return batch, {}
        correction, mask = self.correction, batch.loss_mask
        log_probs, rollout_log_probs = batch.required("old_log_probs"), batch.required("rollout_log_probs")
        mismatch = compute_mismatch(log_probs, rollout_log_probs, mask, correction.ratio_bounds)
        metrics = {f"parity/{name}": value for name, value in mismatch.items()}
        if not correction.acts:
            return batch, metrics
        log_ratio = log_probs - rollout_log_probs
        result = correction.compute(log_ratio, mask)
        done = correction_metrics(correction, log_ratio, mask, result)
        metrics |= {f"rollout_corr/{name}": value for name, value in done.items()}
        return batch.with_fields(rollout_is_weights=result.weights, accepted=result.accepted), metrics
