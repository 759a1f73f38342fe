"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from mrl.reshard.families.config import Config, read_spec, refuse
from mrl.reshard.spec import ModelSpec

ARCHITECTURE = "Qwen2ForCausalLM"


def spec_from_config(config: Config) -> ModelSpec:
    """The spec of a Qwen2 config.json; see `read_spec`."""
    if config.get("num_key_value_heads") is None:
        raise refuse(config, "num_key_value_heads", "the default differs between libraries, it must be written out")
    if config.get("dual_chunk_attention_config"):
        raise refuse(config, "dual_chunk_attention_config", "not supported")
    _refuse_sliding_window(config)
    return read_spec(config, attention_bias=True, max_position_embeddings=32768)


def _refuse_sliding_window(config: Config) -> None:
    """Layers from `max_window_layers` on slide; published configs switch it off or set it past the last layer."""
    if not config.get("use_sliding_window") or config.get("layer_types"):
        return
    if config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0):
        raise refuse(config, "use_sliding_window", "sliding-window attention is not supported")
