"""Mistral without a sliding window: the layout of Llama."""

from __future__ import annotations

from mrl.reshard.families.config import Config, read_spec, refuse_short_window, require_kv_heads
from mrl.reshard.families.family import Family
from mrl.reshard.families.parts import dense_layer
from mrl.reshard.spec import ModelSpec


def _read(config: Config) -> ModelSpec:
    require_kv_heads(config)
    spec = read_spec(config, defaults={"max_position_embeddings": 131072})
    # Transformers takes 4096 for an absent window.
    refuse_short_window({"sliding_window": 4096, **config}, spec)
    return spec


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=_read, layer=dense_layer)
