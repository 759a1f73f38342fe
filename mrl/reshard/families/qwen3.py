"""Qwen3: Llama with RMSNorm over each head of q and k."""

from __future__ import annotations

from mrl.reshard.families.config import (
    Config,
    read_spec,
    refuse_attention_bias,
    refuse_late_sliding_window,
    require_kv_heads,
)
from mrl.reshard.families.family import Family
from mrl.reshard.families.parts import dense_layer
from mrl.reshard.spec import ModelSpec


def _read(config: Config) -> ModelSpec:
    require_kv_heads(config)
    refuse_attention_bias(config)
    refuse_late_sliding_window(config)
    return read_spec(config, defaults={"max_position_embeddings": 32768, "head_dim": 128}, qk_layernorm=True)


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=_read, layer=dense_layer)
