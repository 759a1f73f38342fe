"""Settings of the policy and its reference: sections `actor_rollout_ref.actor` and `actor_rollout_ref.ref`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.checkpoint import CheckpointConfig
from mrl.config.checks import at_least, more_than, not_both
from mrl.config.megatron import MegatronConfig, TrainableMegatronConfig
from mrl.config.optim import OptimConfig
from mrl.config.section import Section

LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLLossKind = Literal[KLKind, "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+"]


@dataclass(kw_only=True, frozen=True)
class ActorConfig(Section):
    """The policy's updates."""

    ppo_mini_batch_size: int = 256
    """Prompts per optimizer step, over all ranks; each brings `rollout.n` samples."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Samples per forward-backward pass on a data-parallel rank; has to be set."""
    ppo_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    ppo_epochs: int = 1
    """Passes over a step's samples."""
    shuffle: bool = False
    """Cut mini-batches from a seeded random order of the samples."""
    clip_ratio: float = 0.2
    """PPO's clip range of the probability ratio, on both sides."""
    clip_ratio_low: float = 0.2
    """Clip range below 1; `clip_ratio` unless set."""
    clip_ratio_high: float = 0.2
    """Clip range above 1; `clip_ratio` unless set."""
    clip_ratio_c: float = 3.0
    """Dual clip: bound of the ratio where the advantage is negative."""
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
    megatron: TrainableMegatronConfig = field(default_factory=TrainableMegatronConfig)
    """Layout and memory."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Contents of checkpoints."""

    def check(self) -> None:
        at_least(self, 1, "ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size", "ppo_epochs")
        at_least(self, 1, "loss_scale_factor")
        at_least(self, 0, "clip_ratio", "clip_ratio_low", "clip_ratio_high", "entropy_coeff", "kl_loss_coef")
        more_than(self, 1, "clip_ratio_c")
        not_both(self, "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")


@dataclass(kw_only=True, frozen=True)
class RefConfig(Section):
    """The frozen reference policy; built only when a KL term needs it."""

    log_prob_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass on a data-parallel rank; has to be set when the reference is used."""
    log_prob_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Layout and memory; the actor's unless set."""

    def check(self) -> None:
        at_least(self, 1, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
        not_both(self, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
