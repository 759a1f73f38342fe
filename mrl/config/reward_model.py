"""Settings of a discriminative reward model: section `reward.reward_model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mrl.config.checks import at_least, finite
from mrl.config.errors import ConfigError
from mrl.config.megatron import MegatronConfig
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class RewardModelConfig(Section):
    """A classifier with one output that scores conversations, run by Megatron; logged as `reward/reward_model`."""

    enable: bool = False
    """Score samples with the model."""
    model_path: str | None = None
    """Hugging Face folder of a *ForSequenceClassification model with one label and its tokenizer."""
    micro_batch_size_per_gpu: int | None = None
    """Samples per pass on a data-parallel rank; has to be set."""
    weight: float = 1.0
    """Factor of the score in the sum of rewards."""
    on_failure: Literal["zero", "raise"] | None = None
    """What a conversation that is too long for the model costs; null is `reward.on_failure`."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Layout and memory."""

    def check(self) -> None:
        at_least(self, 1, "micro_batch_size_per_gpu")
        finite(self, "weight")
        if self.enable and self.model_path is None:
            raise ConfigError("enable = True needs model_path, which is null; give the model's folder")
        if self.megatron.use_dist_checkpointing:
            raise ConfigError("megatron.use_dist_checkpointing: a reward model is read from its Hugging Face folder")
