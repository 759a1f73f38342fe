"""Core attention of Megatron's local layer spec, for padded and for packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mrl.backends.megatron.inputs import PackedSequences

_SHORT = 64


class SequenceAttention(DotProductAttention):
    """Megatron's attention, which refuses packed sequences, with causal attention within each of them.

    Neighbours in a pack that are alike in length run together, padded to the longest of them.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Padded: as Megatron's. Packed: [N, heads/tp, d], keys and values with KV heads/tp, -> [N, heads/tp * d]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        assert isinstance(packed_seq_params, PackedSequences), "packs are described by mrl.backends.megatron.inputs"
        assert self.config.window_size is None, "packed sequences are not cut to attention windows"
        assert self.config.attention_dropout == 0.0
        assert self.softmax_offset is None
        return attend_within(packed_seq_params.lengths, query, key, value, scale=self.softmax_scale)


def attend_within(lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention within each of the sequences that lie end to end.

    Args:
        lengths: of the sequences; their sum is N.
        query: [N, heads, d].
        key, value: [N, KV heads, d].

    Returns:
        [N, heads * d].
    """
    runs = split_runs(lengths)
    sizes = [sum(run) for run in runs]
    parts = zip(runs, *(tensor.split(sizes) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(run, *tensors, scale=scale) for run, *tensors in parts])


def split_runs(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Neighbours in `lengths` joined as long as none is less than half of the longest of its run, or all are short.

    Padding a run to its longest at most quadruples the work of a long sequence, and another call would cost more than
    the work of a short one. Sorted lengths have few runs.
    """
    runs: list[list[int]] = []
    for length in lengths:
        longest = max(*runs[-1], length) if runs else 0
        if runs and (longest <= _SHORT or 2 * min(*runs[-1], length) >= longest):
            runs[-1].append(length)
        else:
            runs.append([length])
    return [tuple(run) for run in runs]


def _attend(lengths: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention within sequences of similar `lengths`. [n, heads, d] -> [n, heads * d]."""
    count, width = len(lengths), max(lengths)
    inside = None
    if min(lengths) < width:
        device = query.device
        inside = torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)

    def spread(tensor: Tensor) -> Tensor:
        """[n, heads, d] -> [count, heads, width, d]."""
        if inside is not None:
            padded = tensor.new_zeros(count, width, *tensor.shape[1:])
            tensor = padded.index_put((inside,), tensor)
        return tensor.view(count, width, *tensor.shape[-2:]).transpose(1, 2)

    attended = scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scale, enable_gqa=True
    )
    attended = attended.transpose(1, 2).flatten(2)
    return attended.flatten(0, 1) if inside is None else attended[inside]
