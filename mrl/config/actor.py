"""Settings of the policy and its reference: sections `actor_rollout_ref.actor` and `actor_rollout_ref.ref`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.checkpoint import CheckpointConfig
from mrl.config.checks import at_least, more_than, not_both
from mrl.config.errors import ConfigError
from mrl.config.megatron import ActorMegatronConfig, MegatronConfig
from mrl.config.optim import OptimConfig
from mrl.config.section import Section

LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
LossMode = Literal[
    "vanilla", "gspo", "cispo", "gpg", "clip_cov", "kl_cov", "geo_mean", "sapo", "dppo_tv", "dppo_kl", "dro"
]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLLossKind = Literal[KLKind, "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+"]


CLIP_BELOW_ONE: frozenset[str] = frozenset({"vanilla", "gspo", "cispo", "clip_cov"})
"""The losses whose `clip_ratio_low` is a distance of the ratio from 1."""

SEQUENCE_MEAN_LOSSES: frozenset[str] = frozenset({"geo_mean", "sapo"})
"""The losses that are aggregated as seq-mean-token-mean whatever `loss_agg_mode` says."""


@dataclass(kw_only=True, frozen=True)
class PolicyLossConfig(Section):
    """Which policy loss, and what only some of them take; docs/algorithms.md has each one's formula and keys."""

    loss_mode: LossMode = "vanilla"
    """The policy loss; vanilla is PPO's clipped surrogate."""
    clip_cov_ratio: float = 0.0002
    """clip_cov: share of a mini-batch's trained tokens that lose their gradient, at least one token."""
    clip_cov_lb: float = 1.0
    """clip_cov: lower bound of the covariance of tokens that may be drawn."""
    clip_cov_ub: float = 5.0
    """clip_cov: upper bound of the covariance of tokens that may be drawn."""
    kl_cov_ratio: float = 0.0002
    """kl_cov: share of a mini-batch's trained tokens that are held by a KL penalty, at least one token."""
    ppo_kl_coef: float = 0.1
    """kl_cov: weight of that penalty."""
    dro_beta: float | None = None
    """dro: weight of the quadratic penalty on the log-ratio; has to be set for it."""

    def check(self) -> None:
        more_than(self, 0, "clip_cov_ratio", "kl_cov_ratio", "dro_beta")
        at_least(self, 0, "ppo_kl_coef")
        if self.kl_cov_ratio > 1:
            raise ConfigError(f"kl_cov_ratio = {self.kl_cov_ratio} must be at most 1")
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ConfigError(f"clip_cov_lb = {self.clip_cov_lb} must be below clip_cov_ub = {self.clip_cov_ub}")
        if self.loss_mode == "dro" and self.dro_beta is None:
            raise ConfigError("dro_beta = null, but loss_mode = dro needs one; its scale is that of the advantages")


@dataclass(kw_only=True, frozen=True)
class ActorConfig(Section):
    """The policy's updates."""

    ppo_mini_batch_size: int = 256
    """Prompts per optimizer step, over all ranks; each brings `rollout.n` samples."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Samples per forward-backward pass on a data-parallel rank; has to be set without `use_dynamic_bsz`."""
    ppo_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    use_dynamic_bsz: bool = False
    """Cut micro-batches by their number of tokens instead of samples."""
    ppo_max_token_len_per_gpu: int = 16384
    """Most tokens per forward-backward pass on a GPU, with `use_dynamic_bsz`."""
    ppo_epochs: int = 1
    """Passes over a step's samples."""
    shuffle: bool = False
    """Cut mini-batches from a seeded random order of the samples."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The policy loss."""
    clip_ratio: float = 0.2
    """PPO's clip range of the probability ratio, on both sides."""
    clip_ratio_low: float = 0.2
    """Clip range below 1; `clip_ratio` unless set."""
    clip_ratio_high: float = 0.2
    """Clip range above 1; `clip_ratio` unless set."""
    clip_ratio_c: float = 3.0
    """Dual clip: bound of the ratio where the advantage is negative; dppo: of the importance weight."""
    tau_pos: float = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    tau_neg: float = 1.05
    """sapo: temperature of the gate elsewhere."""
    loss_agg_mode: LossAggMode = "token-mean"
    """How token losses become one number."""
    loss_scale_factor: int | None = None
    """Divisor of seq-mean-token-sum-norm; null is `data.max_response_length`."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add a KL term against the reference to the loss."""
    kl_loss_coef: float = 0.001
    """Weight of that term."""
    kl_loss_type: KLLossKind = "low_var_kl"
    """Its estimator: kl is k1, mse is k2, low_var_kl is k3; a + takes the gradient of k2 instead of its own."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    megatron: ActorMegatronConfig = field(default_factory=ActorMegatronConfig)
    """Layout and memory."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Contents of checkpoints."""

    def check(self) -> None:
        at_least(self, 1, "ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size", "ppo_epochs")
        at_least(self, 1, "ppo_max_token_len_per_gpu", "loss_scale_factor")
        at_least(self, 0, "clip_ratio", "clip_ratio_low", "clip_ratio_high", "entropy_coeff", "kl_loss_coef")
        more_than(self, 1, "clip_ratio_c")
        more_than(self, 0, "tau_pos", "tau_neg")
        if self.policy_loss.loss_mode in CLIP_BELOW_ONE and self.clip_ratio_low > 1:
            raise ConfigError(
                f"clip_ratio_low = {self.clip_ratio_low} must be at most 1: ratios cannot fall by more "
                f"(policy_loss.loss_mode = {self.policy_loss.loss_mode})"
            )
        not_both(self, "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")


@dataclass(kw_only=True, frozen=True)
class RefConfig(Section):
    """The frozen reference policy; built only when a KL term needs it."""

    log_prob_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass on a data-parallel rank; has to be set when the reference is used without
    `log_prob_use_dynamic_bsz`."""
    log_prob_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    log_prob_use_dynamic_bsz: bool = False
    """Cut micro-batches by their number of tokens instead of samples; the actor's `use_dynamic_bsz` unless set."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens per forward pass on a GPU, with `log_prob_use_dynamic_bsz`; the actor's unless set."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Layout and memory; the actor's unless set."""

    def check(self) -> None:
        at_least(self, 1, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
        at_least(self, 1, "log_prob_max_token_len_per_gpu")
        not_both(self, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
