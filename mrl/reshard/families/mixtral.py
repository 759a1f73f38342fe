"""Mixtral: Llama with experts in every layer."""

from __future__ import annotations

from mrl.reshard.families.config import (
    Config,
    read_experts,
    read_spec,
    refuse,
    refuse_short_window,
    require_kv_heads,
)
from mrl.reshard.families.family import ExpertNames, Family
from mrl.reshard.families.parts import moe_layer
from mrl.reshard.spec import ModelSpec

_NAMES = ExpertNames(module="block_sparse_moe", gate="w1", up="w3", down="w2")


def _read(config: Config) -> ModelSpec:
    require_kv_heads(config)
    if config.get("router_jitter_noise"):
        raise refuse(config, "router_jitter_noise", "noise on the router's input is not supported")
    experts = read_experts(
        {**config, "norm_topk_prob": True}, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )
    defaults = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    spec = read_spec(config, defaults=defaults, moe=experts)
    refuse_short_window(config, spec)
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        raise refuse(config, "head_dim", "SGLang's Mixtral takes hidden_size / num_attention_heads")
    if spec.rope_scaling:
        raise ValueError("mixtral config has a scaled rotary embedding, which SGLang's Mixtral does not apply")
    return spec


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    layer=lambda spec: moe_layer(spec, _NAMES),
    experts=_NAMES,
)
