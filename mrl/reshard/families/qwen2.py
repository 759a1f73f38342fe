"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from mrl.reshard.families.config import (
    Config,
    read_spec,
    refuse,
    refuse_late_sliding_window,
    require_kv_heads,
)
from mrl.reshard.families.family import Family
from mrl.reshard.families.parts import dense_layer
from mrl.reshard.spec import ModelSpec


def _read(config: Config) -> ModelSpec:
    require_kv_heads(config)
    if config.get("dual_chunk_attention_config"):
        raise refuse(config, "dual_chunk_attention_config", "not supported")
    refuse_late_sliding_window(config)
    return read_spec(config, defaults={"max_position_embeddings": 32768}, attention_bias=True)


FAMILY = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", read=_read, layer=dense_layer)
