"""What the actor and the critic minimise, as loss functions of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mrl.algorithms.aggregation import LossNorm, aggregate_loss, check_loss_agg_mode, token_mean
from mrl.algorithms.kl import check_kl_kind, compute_kl
from mrl.algorithms.masking import masked_max
from mrl.algorithms.policy_losses.base import BoundPolicyLoss, PolicyInputs, PolicyLoss, PolicyTerms
from mrl.algorithms.policy_losses.vanilla import Vanilla
from mrl.algorithms.rollout_correction import RolloutCorrection, mismatch_means
from mrl.algorithms.value_loss import check_cliprange_value, compute_value_loss
from mrl.types import Metric, TrainBatch

# The same types as in mrl.interfaces, which this package does not import.
ModelOutput = Mapping[str, Tensor]
LossFn = Callable[[ModelOutput, TrainBatch], tuple[Tensor, dict[str, Metric]]]


@dataclass(kw_only=True, frozen=True)
class PolicyObjective:
    """A policy loss with optional entropy bonus and KL loss, under one `loss_agg_mode` unless the loss has its own."""

    policy_loss: PolicyLoss = field(default_factory=Vanilla)
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Constant divisor, for `seq-mean-token-sum-norm` only."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""
    monitor_entropy: bool = True
    """Report the entropy even where it has no weight."""
    correction: RolloutCorrection | None = None
    """Applied with the log-probs in training, which rollout_log_probs are then compared with: bypass mode. None where
    the batch brings what a correction made of the old log-probs."""
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"

    def __post_init__(self) -> None:
        check_loss_agg_mode(self.loss_agg_mode, self.loss_scale_factor)
        check_kl_kind(self.kl_loss_type)

    @property
    def needs_entropy(self) -> bool:
        """Whether the model must put `entropy` beside `log_probs`."""
        return self.monitor_entropy or self.entropy_coeff != 0

    def bind(self, mini_batch: TrainBatch) -> LossFn:
        """The loss function of `mini_batch`'s micro-batches; both must have old_log_probs and advantages set.

        With `use_kl_loss` they need ref_log_probs, too. Every rank binds the same, whole mini-batch. Tokens that
        rollout correction rejected count nowhere: not in the sums, the denominators or the metrics.
        """
        mini_batch = _without_rejected(mini_batch)
        norm = LossNorm.of(mini_batch.loss_mask, loss_scale_factor=self.loss_scale_factor)
        return partial(self._compute, norm=norm, policy_loss=self.policy_loss.bind(mini_batch))

    def _compute(
        self, output: ModelOutput, batch: TrainBatch, *, norm: LossNorm, policy_loss: BoundPolicyLoss
    ) -> tuple[Tensor, dict[str, Metric]]:
        metrics: dict[str, Metric] = {}
        batch = _without_rejected(batch)
        # What the denominators count, and hence what the metrics are means over.
        counted = batch.loss_mask
        if self.correction is not None:
            batch, metrics = _correct(batch, output["log_probs"].detach(), self.correction, norm)
        inputs = _policy_inputs(output, batch)
        terms = policy_loss(inputs)
        loss = self._aggregate_policy(terms.token_loss, batch, norm)
        metrics |= {"actor/pg_loss": _share(loss), **_policy_metrics(inputs, terms, counted, norm)}
        aggregate = partial(aggregate_loss, loss_mask=batch.loss_mask, mode=self.loss_agg_mode, norm=norm)
        if self.needs_entropy:
            metrics["actor/entropy"] = Metric(token_mean(output["entropy"], counted, norm))
        if self.entropy_coeff != 0:
            loss = loss - self.entropy_coeff * aggregate(output["entropy"])
        if self.use_kl_loss:
            kl_loss = aggregate(compute_kl(output["log_probs"], batch.required("ref_log_probs"), self.kl_loss_type))
            metrics["actor/kl_loss"] = _share(kl_loss)
            loss = loss + self.kl_loss_coef * kl_loss
        return loss, metrics

    def _aggregate_policy(self, token_loss: Tensor, batch: TrainBatch, norm: LossNorm) -> Tensor:
        mask = batch.loss_mask
        if batch.rollout_is_weights is not None:
            token_loss = token_loss * self.policy_loss.combine_weights(batch.rollout_is_weights, mask)
        return aggregate_loss(token_loss, mask, self.policy_loss.loss_agg_mode or self.loss_agg_mode, norm)


@dataclass(kw_only=True, frozen=True)
class ValueObjective:
    """PPO's value objective."""

    cliprange_value: float = 0.5
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Constant divisor, for `seq-mean-token-sum-norm` only."""
    needs_entropy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_cliprange_value(self.cliprange_value)
        check_loss_agg_mode(self.loss_agg_mode, self.loss_scale_factor)

    def bind(self, mini_batch: TrainBatch) -> LossFn:
        """The loss function of `mini_batch`'s micro-batches; they must have values and returns set."""
        norm = LossNorm.of(mini_batch.loss_mask, loss_scale_factor=self.loss_scale_factor)
        return partial(self._compute, norm=norm)

    def _compute(self, output: ModelOutput, batch: TrainBatch, *, norm: LossNorm) -> tuple[Tensor, dict[str, Metric]]:
        mask, returns = batch.loss_mask, batch.required("returns")
        value = compute_value_loss(
            output["values"], batch.required("values"), returns, cliprange_value=self.cliprange_value
        )
        metrics = {
            "critic/clip_fraction": Metric(token_mean(value.clipped, mask, norm)),
            "critic/value_mean": Metric(token_mean(output["values"], mask, norm)),
            "critic/return_mean": Metric(token_mean(returns, mask, norm)),
        }
        return aggregate_loss(value.token_loss, mask, self.loss_agg_mode, norm), metrics


def _correct(
    batch: TrainBatch, log_probs: Tensor, correction: RolloutCorrection, norm: LossNorm
) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch with weights and without the tokens that are rejected, by the current policy.

    Denominators stay those of all trained tokens: how many of them a mini-batch's other micro-batches reject is not
    known before they have run.
    """
    mask = batch.loss_mask
    log_ratio = log_probs - batch.required("rollout_log_probs")
    result = correction.compute(log_ratio, mask)
    metrics = {
        f"actor/rollout_{name}": Metric(token_mean(values, mask, norm))
        for name, values in mismatch_means(log_ratio, correction.ratio_bounds).items()
    }
    if result.accepted is not None:
        metrics["actor/rollout_rs_masked_fraction"] = Metric(token_mean(~result.accepted, mask, norm))
    corrected = batch.with_fields(rollout_is_weights=result.weights, accepted=result.accepted)
    return _without_rejected(corrected), metrics


def _without_rejected(batch: TrainBatch) -> TrainBatch:
    if batch.accepted is None:
        return batch
    return batch.with_fields(loss_mask=batch.loss_mask & batch.accepted)


def _policy_inputs(output: ModelOutput, batch: TrainBatch) -> PolicyInputs:
    return PolicyInputs(
        tokens=batch.tokens,
        loss_mask=batch.loss_mask,
        log_probs=output["log_probs"],
        old_log_probs=batch.required("old_log_probs"),
        advantages=batch.required("advantages"),
    )


def _policy_metrics(inputs: PolicyInputs, terms: PolicyTerms, mask: Tensor, norm: LossNorm) -> dict[str, Metric]:
    return {
        # The k1 estimate of KL(old || new).
        "actor/kl": Metric(token_mean(-inputs.log_ratio, mask, norm)),
        "actor/ratio_mean": Metric(token_mean(terms.ratio, mask, norm)),
        "actor/ratio_max": Metric(masked_max(terms.ratio.float(), mask, empty=0.0), "max"),
        **{f"actor/{name}": Metric(token_mean(flags, mask, norm)) for name, flags in terms.fractions.items()},
    }


def _share(loss: Tensor) -> Metric:
    # A copy: pipeline schedules divide the loss they are given in place.
    return Metric(loss.detach().to(torch.float32).clone())
