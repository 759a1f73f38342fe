"""Settings of a role's optimizer: sections `*.optim`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, check_names, more_than, positive_or_unset, within
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class OptimConfig(Section):
    """AdamW and its learning-rate schedule, whose lengths are PPO steps, as verl's: it moves on with every optimizer
    step, of which a PPO step has several."""

    lr: float = 1e-6
    """Peak learning rate."""
    lr_warmup_steps: int = -1
    """PPO steps of linear warm-up from `lr_warmup_init`; -1 takes `lr_warmup_steps_ratio`."""
    lr_warmup_steps_ratio: float = 0.0
    """The same as a share of `total_training_steps`."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of the warm-up."""
    total_training_steps: int = -1
    """PPO steps after which the decay ends; -1 is the whole run, counted by the trainer."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    """How the learning rate falls to `min_lr` after warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of first and second moment."""
    clip_grad: float = 1.0
    """Gradients are scaled down to this global norm; 0 is off."""
    override_optimizer_config: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Of Megatron's OptimizerConfig `adam_eps`; the others have keys of their own."""

    def check(self) -> None:
        more_than(self, 0, "lr")
        at_least(self, 0, "min_lr", "lr_warmup_init", "weight_decay", "clip_grad")
        at_least(self, -1, "lr_warmup_steps")
        within(self, 0, 1, "lr_warmup_steps_ratio")
        positive_or_unset(self, "total_training_steps")
        check_names(self, "override_optimizer_config", ("adam_eps",))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas = {list(self.betas)} must lie in [0, 1)")
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(self, name) > self.lr:
                raise ConfigError(f"{name} = {getattr(self, name)} is above lr = {self.lr}; lower {name}")
