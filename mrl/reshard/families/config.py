"""Reading a Hugging Face config.json into a `ModelSpec`, refusing whatever would change the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mrl.reshard.spec import MixtureOfExperts, ModelSpec, RopeScaling

Config = Mapping[str, Any]

COMMON_DEFAULTS: Config = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""What transformers takes for fields that a config.json lacks."""


def read_spec(
    config: Config,
    *,
    defaults: Config,
    attention_bias: bool = False,
    qk_layernorm: bool = False,
    moe: MixtureOfExperts | None = None,
) -> ModelSpec:
    """The spec of a RoPE, RMSNorm, SwiGLU decoder.

    Args:
        config: parsed config.json. Transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) both work.
        defaults: what the family's configuration class in transformers takes for absent fields, where that is not
            `COMMON_DEFAULTS`.
        attention_bias: whether this family has a bias on q, k and v.
        qk_layernorm: whether this family normalizes q and k.
        moe: of a family with experts; its `intermediate_size` is one expert's.

    Raises:
        ValueError: a required field is missing, or a field asks for something this package cannot honour.
    """
    config = {**COMMON_DEFAULTS, **defaults, **{name: value for name, value in config.items() if value is not None}}
    _refuse_unsupported(config)
    heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    rope_theta, rope_scaling = _rope(config)
    return ModelSpec(
        family=config["model_type"],
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, hidden_size, heads),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        max_position_embeddings=_size(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        attention_bias=attention_bias,
        qk_layernorm=qk_layernorm,
        rope_scaling=rope_scaling,
        moe=moe,
    )


def read_experts(
    config: Config, *, num_experts: int, num_experts_per_tok: int, norm_topk_prob: bool
) -> MixtureOfExperts:
    """The mixture of experts of a config; the arguments are the family's defaults.

    Raises:
        ValueError: a size is not positive, a token has more experts than there are, or the embeddings are tied.
    """
    if config.get("tie_word_embeddings"):
        raise refuse(config, "tie_word_embeddings", "SGLang's models with experts do not tie them")
    # Transformers writes either name for Mixtral and Qwen3-MoE, and reads both.
    given = {name: value for name, value in config.items() if value is not None}
    given.setdefault("num_experts", given.get("num_local_experts", num_experts))
    given.setdefault("num_experts_per_tok", num_experts_per_tok)
    count, per_token = _size(given, "num_experts"), _size(given, "num_experts_per_tok")
    if per_token > count:
        raise ValueError(f"num_experts_per_tok = {per_token} exceeds num_experts = {count}")
    return MixtureOfExperts(
        num_experts=count,
        num_experts_per_tok=per_token,
        norm_topk_prob=bool(given.get("norm_topk_prob", norm_topk_prob)),
    )


def refuse_attention_bias(config: Config) -> None:
    """Raise ValueError if a family whose `attention_bias` is optional has it: there o_proj has one, too."""
    if config.get("attention_bias"):
        raise refuse(config, "attention_bias", "it also puts a bias on o_proj, which is not supported")


def require_kv_heads(config: Config) -> None:
    """Raise ValueError if `num_key_value_heads` is left to a default, which differs between libraries."""
    if config.get("num_key_value_heads") is None:
        raise ValueError(
            f"{config.get('model_type')} config has no num_key_value_heads, and its default differs between "
            "libraries; write it into config.json"
        )


def refuse_late_sliding_window(config: Config) -> None:
    """Raise ValueError if layers from `max_window_layers` on slide; published configs switch that off or start late."""
    if not config.get("use_sliding_window") or config.get("layer_types"):
        return
    if config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0):
        raise refuse(config, "use_sliding_window", "sliding-window attention is not supported")


def refuse_short_window(config: Config, spec: ModelSpec) -> None:
    """Raise ValueError if attention slides within the model's context."""
    window = config.get("sliding_window")
    if window is not None and window < spec.max_position_embeddings:
        raise refuse(
            config,
            "sliding_window",
            "sliding-window attention is not supported; of a window that is at least max_position_embeddings = "
            f"{spec.max_position_embeddings}, or null, nothing is felt",
        )


def refuse(config: Config, field: str, reason: str) -> ValueError:
    """The error for a config field that cannot be honoured."""
    return ValueError(
        f"{config.get('model_type')} config has {field} = {config.get(field)!r}: {reason}; use a model without it"
    )


def _refuse_unsupported(config: Config) -> None:
    if config["hidden_act"] != "silu":
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


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 moved `rope_theta` and `rope_scaling` into `rope_parameters`."""
    theta, scaling = config["rope_theta"], None
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if not rope:
            continue
        theta = rope.get("rope_theta", theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise refuse(config, field, "only the default rotary embedding and Llama 3's are supported")
        if kind == "llama3":
            scaling = _llama3_scaling(config, field, rope)
    return float(theta), scaling


def _llama3_scaling(config: Config, field: str, rope: Config) -> RopeScaling:
    names = [entry.name for entry in fields(RopeScaling)]
    if not all(isinstance(rope.get(name), int | float) and rope[name] > 0 for name in names):
        raise refuse(config, field, f"llama3 needs positive {', '.join(names)}")
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise refuse(config, field, "low_freq_factor must be less than high_freq_factor")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
