"""Rotary embedding beyond Megatron's: Llama 3's rescaling with all its constants, and packed sequences at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mrl.backends.megatron.inputs import PackedSequences
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


class PackedRotary(torch.nn.Module):
    """Megatron's rotary embedding for the local layers, with a row of frequencies for each token of a pack.

    Given rows up to the longest sequence only, Megatron rotates one sequence after the other, which takes longer than
    all other work on short ones. Rows for all tokens are rotated in one operation.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *args: Any, packed_seq_params: PackedSeqParams | None = None) -> int | PackedSequences:
        """What `forward` takes: a number of positions, or the packed sequences."""
        params = packed_seq_params or next((arg for arg in args if isinstance(arg, PackedSeqParams)), None)
        if params is None:
            return int(self.rotary.get_rotary_seq_len(*args))
        assert isinstance(params, PackedSequences), "packs are described by mrl.backends.megatron.inputs"
        return params

    def forward(self, length: int | PackedSequences, **options: Any) -> Tensor:
        """[length, 1, 1, head_dim], or one row for each packed token."""
        if isinstance(length, PackedSequences):
            assert length.positions is not None
            frequencies: Tensor = self.rotary.get_emb(length.max_seqlen_q)[length.positions]
            return frequencies
        rows: Tensor = self.rotary(length, **options)
        return rows
