"""What the layout tables and the model builders need to know of a Hugging Face model. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(kw_only=True, frozen=True)
class RopeScaling:
    """Llama 3's rescaling of the rotary frequencies (`rope_type` "llama3"), in Hugging Face's words."""

    factor: float
    """Wavelengths of more than original_max_position_embeddings / low_freq_factor tokens grow by this."""
    low_freq_factor: float
    high_freq_factor: float
    """Wavelengths of less than original_max_position_embeddings / high_freq_factor tokens stay."""
    original_max_position_embeddings: int


@dataclass(kw_only=True, frozen=True)
class ModelSpec:
    """Shape of a decoder-only model, in Hugging Face's words."""

    family: str
    """Hugging Face `model_type`: "llama", "qwen2"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias on the q, k and v projections."""
    qk_layernorm: bool = False
    """RMSNorm over each head of q and of k, before the rotary embedding."""
    rope_scaling: RopeScaling | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        scaling = data.get("rope_scaling")
        return cls(**{**data, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def load_spec(path: str | Path) -> ModelSpec:
    """The spec of a Hugging Face model folder.

    Raises:
        ValueError: no config.json, an unsupported `model_type`, or a config field this package cannot honour.
    """
    from mrl.reshard.families import spec_from_config

    config = Path(path) / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} is not a Hugging Face model folder: {config} does not exist")
    return spec_from_config(json.loads(config.read_text()))
