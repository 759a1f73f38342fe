"""Llama: no biases."""

from __future__ import annotations

from mrl.reshard.families.config import Config, read_spec, refuse
from mrl.reshard.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"


def spec_from_config(config: Config) -> ModelSpec:
    """The spec of a Llama config.json; see `read_spec`."""
    for field in ("attention_bias", "bias"):
        if config.get(field):
            raise refuse(config, field, "Llama's attention_bias also puts a bias on o_proj, which is not supported")
    return read_spec(config, attention_bias=False, max_position_embeddings=2048)
