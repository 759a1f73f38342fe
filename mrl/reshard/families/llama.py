"""Llama 2, 3, 3.1 and 3.2: no biases."""

from __future__ import annotations

from mrl.reshard.families.config import Config, read_spec, refuse, refuse_attention_bias
from mrl.reshard.families.family import Family
from mrl.reshard.families.parts import dense_layer
from mrl.reshard.spec import ModelSpec


def _read(config: Config) -> ModelSpec:
    refuse_attention_bias(config)
    if config.get("bias"):
        raise refuse(config, "bias", "not supported")
    return read_spec(config, defaults={"max_position_embeddings": 2048})


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=_read, layer=dense_layer)
