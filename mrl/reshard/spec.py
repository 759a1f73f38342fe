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
class MixtureOfExperts:
    """Experts in the place of every layer's MLP, in Hugging Face's words."""

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    """Whether the probabilities of a token's experts are scaled to a sum of 1."""


_CLASSIFIER = "ForSequenceClassification"


@dataclass(kw_only=True, frozen=True)
class ModelSpec:
    """Shape of a decoder-only model, in Hugging Face's words."""

    family: str
    """Hugging Face `model_type`: "llama", "qwen2"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of the MLP, or of each expert."""
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
    moe: MixtureOfExperts | None = None
    """None: a dense model."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        scaling, moe = data.get("rope_scaling"), data.get("moe")
        nested = {
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "moe": MixtureOfExperts(**moe) if moe else None,
        }
        return cls(**{**data, **nested})


def load_spec(path: str | Path) -> ModelSpec:
    """The spec of a Hugging Face model folder.

    Raises:
        ValueError: no config.json, an unsupported `model_type`, or a config field this package cannot honour.
    """
    from mrl.reshard.families import spec_from_config

    return spec_from_config(_read_config(path))


def load_classifier_spec(path: str | Path) -> ModelSpec:
    """The spec of the backbone of a folder with a *ForSequenceClassification model of one label.

    Raises:
        ValueError: another kind of model, more labels, or what `load_spec` refuses.
    """
    from mrl.reshard.families import spec_from_config

    config = _read_config(path)
    architectures = config.get("architectures") or []
    if not any(name.endswith(_CLASSIFIER) for name in architectures):
        raise ValueError(f"{path} holds {architectures}, not a *{_CLASSIFIER} model with a score.weight")
    # Without either field transformers gives a classifier two labels.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise ValueError(f"the classifier of {path} has {labels} labels; a reward model has one (num_labels = 1)")
    backbone = [name.replace(_CLASSIFIER, "ForCausalLM") for name in architectures]
    return spec_from_config({**config, "architectures": backbone})


def _read_config(path: str | Path) -> dict[str, Any]:
    config = Path(path) / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} is not a Hugging Face model folder: {config} does not exist")
    return dict(json.loads(config.read_text()))
