"""Qwen3-MoE: Qwen3 with experts in every layer."""

from __future__ import annotations

from mrl.reshard.families.config import (
    Config,
    read_experts,
    read_spec,
    refuse,
    refuse_attention_bias,
    require_kv_heads,
)
from mrl.reshard.families.family import ExpertNames, Family
from mrl.reshard.families.parts import moe_layer
from mrl.reshard.spec import ModelSpec

_NAMES = ExpertNames(module="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def _read(config: Config) -> ModelSpec:
    require_kv_heads(config)
    refuse_attention_bias(config)
    if config.get("use_sliding_window"):
        raise refuse(config, "use_sliding_window", "sliding-window attention is not supported")
    if config.get("mlp_only_layers"):
        raise refuse(config, "mlp_only_layers", "every layer must have experts")
    if config.get("decoder_sparse_step", 1) != 1:
        raise refuse(config, "decoder_sparse_step", "every layer must have experts")
    return read_spec(
        {**config, "intermediate_size": config.get("moe_intermediate_size", 768)},
        defaults={"max_position_embeddings": 32768},
        qk_layernorm=True,
        moe=read_experts(config, num_experts=128, num_experts_per_tok=8, norm_topk_prob=False),
    )


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    layer=lambda spec: moe_layer(spec, _NAMES),
    experts=_NAMES,
)
