"""Llama 3's rescaling of rotary frequencies. Megatron has its own, with all constants but the factor fixed."""

from __future__ import annotations

import math

from torch import Tensor

from mrl.reshard.spec import RopeScaling


def scaled_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies for contexts longer than the original one. [head_dim / 2] float32, both.

    Short wavelengths stay, long ones grow by the factor, and those between are interpolated.

    Source: `rope_type` "llama3" of transformers.
    """
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq
