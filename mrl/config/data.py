"""Settings of the prompts: section `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, positive_or_unset
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class DataConfig(Section):
    """Where prompts come from and how many make a step."""

    train_files: tuple[str, ...] = ("~/data/rlhf/gsm8k/train.parquet",)
    """Parquet files to train on, one or a list; `embedded:train` is the embedded task."""
    val_files: tuple[str, ...] = ("~/data/rlhf/gsm8k/test.parquet",)
    """Parquet files to validate on, one or a list; `embedded:val` is the embedded task."""
    train_max_samples: int = -1
    """Use only this many training rows; -1 is all."""
    val_max_samples: int = -1
    """Use only this many validation rows; -1 is all."""
    prompt_key: str = "prompt"
    """Column that holds the chat messages."""
    reward_fn_key: str = "data_source"
    """Column by which a rule-based reward is chosen."""
    max_prompt_length: int = 512
    """Longest prompt in tokens."""
    max_response_length: int = 512
    """Longest response in tokens."""
    train_batch_size: int = 1024
    """Prompts per step, over all ranks."""
    gen_batch_size: int | None = None
    """Prompts generated at a time with `algorithm.filter_groups.enable`; null is `train_batch_size`."""
    val_batch_size: int | None = None
    """Prompts per validation round; null is the whole validation set at once."""
    shuffle: bool = True
    """Draw training prompts in a seeded random order, new in each epoch."""
    seed: int | None = None
    """Seed of that order; null takes `trainer.seed`."""
    filter_overlong_prompts: bool = False
    """Leave out prompts longer than `max_prompt_length`; how many is logged."""
    truncation: Literal["error", "left", "right", "middle"] = "error"
    """What to do with a longer prompt: refuse it, or cut it on that side."""
    return_raw_chat: bool = True
    """Keep the chat messages with each prompt; always done here."""
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Arguments for the tokenizer's chat template, such as `enable_thinking`."""

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.max_prompt_length + self.max_response_length

    def check(self) -> None:
        at_least(self, 1, "max_prompt_length", "max_response_length", "train_batch_size", "gen_batch_size")
        at_least(self, 1, "val_batch_size")
        positive_or_unset(self, "train_max_samples", "val_max_samples")
        if not self.train_files:
            raise ConfigError("train_files is empty; name at least one parquet file")
