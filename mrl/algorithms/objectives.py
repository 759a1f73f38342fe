"""What the actor and the critic minimise, as loss functions of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mrl.algorithms.aggregation import LossNorm, aggregate_loss, check_loss_agg_mode, token_mean
from mrl.algorithms.kl import check_kl_kind, compute_kl
from mrl.algorithms.masking import masked_max
from mrl.algorithms.policy_loss import PolicyLoss, check_clip_ratios, compute_policy_loss
from mrl.algorithms.value_loss import check_cliprange_value, compute_value_loss
from mrl.types import Metric, TrainBatch

# The same types as in mrl.interfaces, which this package does not import.
ModelOutput = Mapping[str, Tensor]
LossFn = Callable[[ModelOutput, TrainBatch], tuple[Tensor, dict[str, Metric]]]


@dataclass(kw_only=True, frozen=True)
class PolicyObjective:
    """PPO's policy objective with optional entropy bonus and KL loss, all under one `loss_agg_mode`."""

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Constant divisor, for `seq-mean-token-sum-norm` only."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""
    monitor_entropy: bool = True
    """Report the entropy even where it has no weight."""
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"

    def __post_init__(self) -> None:
        check_clip_ratios(
            clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high, clip_ratio_c=self.clip_ratio_c
        )
        check_loss_agg_mode(self.loss_agg_mode, self.loss_scale_factor)
        check_kl_kind(self.kl_loss_type)

    @property
    def needs_entropy(self) -> bool:
        """Whether the model must put `entropy` beside `log_probs`."""
        return self.monitor_entropy or self.entropy_coeff != 0

    def bind(self, mini_batch: TrainBatch) -> LossFn:
        """The loss function of `mini_batch`'s micro-batches; they must have old_log_probs and advantages set.

        With `use_kl_loss` they need ref_log_probs, too. Every rank binds the same, whole mini-batch.
        """
        norm = LossNorm.of(mini_batch.loss_mask, loss_scale_factor=self.loss_scale_factor)
        return partial(self._compute, norm=norm)

    def _compute(self, output: ModelOutput, batch: TrainBatch, *, norm: LossNorm) -> tuple[Tensor, dict[str, Metric]]:
        mask = batch.loss_mask
        aggregate = partial(aggregate_loss, loss_mask=mask, mode=self.loss_agg_mode, norm=norm)
        policy = compute_policy_loss(
            output["log_probs"],
            batch.required("old_log_probs"),
            batch.required("advantages"),
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
            clip_ratio_c=self.clip_ratio_c,
        )
        loss = aggregate(policy.token_loss)
        metrics = {"actor/pg_loss": _share(loss), **_policy_metrics(policy, mask, norm)}
        if self.needs_entropy:
            metrics["actor/entropy"] = Metric(token_mean(output["entropy"], mask, norm))
        if self.entropy_coeff != 0:
            loss = loss - self.entropy_coeff * aggregate(output["entropy"])
        if self.use_kl_loss:
            kl_loss = aggregate(compute_kl(output["log_probs"], batch.required("ref_log_probs"), self.kl_loss_type))
            metrics["actor/kl_loss"] = _share(kl_loss)
            loss = loss + self.kl_loss_coef * kl_loss
        return loss, metrics


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


def _policy_metrics(policy: PolicyLoss, mask: Tensor, norm: LossNorm) -> dict[str, Metric]:
    return {
        "actor/kl": Metric(token_mean(policy.approx_kl, mask, norm)),
        "actor/clip_fraction": Metric(token_mean(policy.clipped, mask, norm)),
        "actor/clip_fraction_lower": Metric(token_mean(policy.clipped_lower, mask, norm)),
        "actor/ratio_mean": Metric(token_mean(policy.ratio, mask, norm)),
        "actor/ratio_max": Metric(masked_max(policy.ratio.float(), mask, empty=0.0), "max"),
    }


def _share(loss: Tensor) -> Metric:
    # A copy: pipeline schedules divide the loss they are given in place.
    return Metric(loss.detach().to(torch.float32).clone())
