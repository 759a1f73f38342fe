"""Settings of the value function: section `critic`."""

from __future__ import annotations

from dataclasses import dataclass, field

from mrl.config.actor import LossAggMode
from mrl.config.checkpoint import CriticCheckpointConfig
from mrl.config.checks import at_least, more_than, not_both
from mrl.config.megatron import TrainableMegatronConfig
from mrl.config.model import CriticModelConfig
from mrl.config.optim import OptimConfig
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class CriticConfig(Section):
    """The critic: its model may be of another family, size and layout than the actor's."""

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    """Initial weights; the value head starts anew."""
    ppo_mini_batch_size: int = 256
    """Prompts per optimizer step, over all ranks; the actor's unless set."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Samples per forward-backward pass on a data-parallel rank; has to be set without `use_dynamic_bsz`."""
    ppo_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    forward_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass on a data-parallel rank; `ppo_micro_batch_size_per_gpu` unless set."""
    forward_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    use_dynamic_bsz: bool = False
    """Cut micro-batches by their number of tokens instead of samples; the actor's unless set."""
    ppo_max_token_len_per_gpu: int = 32768
    """Most tokens per forward-backward pass on a GPU, with `use_dynamic_bsz`."""
    forward_max_token_len_per_gpu: int = 32768
    """Most tokens per forward pass on a GPU, with `use_dynamic_bsz`; `ppo_max_token_len_per_gpu` unless set."""
    ppo_epochs: int = 1
    """Passes over a step's samples; the actor's unless set."""
    shuffle: bool = False
    """Cut mini-batches from a seeded random order of the samples; the actor's unless set."""
    cliprange_value: float = 0.5
    """Clip range of the value's change since the rollout."""
    loss_agg_mode: LossAggMode = "token-mean"
    """How token losses become one number; the actor's unless set."""
    loss_scale_factor: int | None = None
    """Divisor of seq-mean-token-sum-norm; the actor's unless set."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer and learning rate."""
    megatron: TrainableMegatronConfig = field(default_factory=TrainableMegatronConfig)
    """Layout and memory."""
    checkpoint: CriticCheckpointConfig = field(default_factory=CriticCheckpointConfig)
    """Contents of checkpoints."""

    def check(self) -> None:
        at_least(self, 1, "ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size", "ppo_epochs")
        at_least(self, 1, "forward_micro_batch_size_per_gpu", "forward_micro_batch_size", "loss_scale_factor")
        at_least(self, 1, "ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu")
        more_than(self, 0, "cliprange_value")
        not_both(self, "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")
        not_both(self, "forward_micro_batch_size_per_gpu", "forward_micro_batch_size")
