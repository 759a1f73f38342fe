"""Reading a Hugging Face config.json into a `ModelSpec`, refusing whatever would change the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrl.reshard.spec import ModelSpec

Config = Mapping[str, Any]


def read_spec(config: Config, *, attention_bias: bool, max_position_embeddings: int) -> ModelSpec:
    """The spec of a RoPE, RMSNorm, SwiGLU decoder.

    Args:
        config: parsed config.json. Transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) both work.
        attention_bias: whether this family has a bias on q, k and v.
        max_position_embeddings: the family's default.

    Raises:
        ValueError: a required field is missing, or a field asks for something this package cannot honour.
    """
    _refuse_unsupported(config)
    heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    return ModelSpec(
        family=config["model_type"],
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, hidden_size, heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config),
        max_position_embeddings=int(config.get("max_position_embeddings", max_position_embeddings)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
    )


def refuse(config: Config, field: str, reason: str) -> ValueError:
    """The error for a config field that cannot be honoured."""
    return ValueError(
        f"{config.get('model_type')} config has {field} = {config.get(field)!r}: {reason}; use a model without it"
    )


def _refuse_unsupported(config: Config) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise refuse(config, "hidden_act", "only silu (SwiGLU) is supported")
    for field in ("mlp_bias", "quantization_config"):
        if config.get(field):
            raise refuse(config, field, "not supported")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(config, "partial_rotary_factor", "only full rotary embeddings are supported")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise refuse(config, "layer_types", "only full attention is supported")


def _size(config: Config, field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{config.get('model_type')} config has {field} = {value!r}; a positive integer is required")
    return value


def _kv_heads(config: Config, heads: int) -> int:
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads = {heads} is not divisible by num_key_value_heads = {kv_heads}")
    return kv_heads


def _head_dim(config: Config, hidden_size: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if hidden_size % heads:
        raise ValueError(f"hidden_size = {hidden_size} is not divisible by num_attention_heads = {heads}; set head_dim")
    return hidden_size // heads


def _rope_theta(config: Config) -> float:
    """Transformers 5 moved `rope_theta` and `rope_scaling` into `rope_parameters`; both must say plain RoPE."""
    theta = config.get("rope_theta", 10000.0)
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise refuse(config, field, "only the default rotary embedding is supported")
        theta = rope.get("rope_theta", theta)
    return float(theta)
