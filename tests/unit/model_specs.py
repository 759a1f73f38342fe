"""A tiny model's shape, of which each test names what matters to it."""

from __future__ import annotations

from typing import Any

from mrl.reshard.spec import ModelSpec


def make_spec(**fields: Any) -> ModelSpec:
    """A Qwen2 of four layers, eight heads and four KV heads with a vocabulary of 50, but for `fields`."""
    values = dict(
        family="qwen2",
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=2,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return ModelSpec(**{**values, **fields})
