"""Core attention of Megatron's local layer spec, for padded and for packed micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mrl.backends.megatron.inputs import PackedSequences

_SHORT = 64


class SequenceAttention(DotProductAttention):
    """Megatron's attention, which refuses packed sequences, with causal attention within each of them.

    Neighbours in a pack that are alike in length run together, padded to the longest of them. Context-parallel ranks
    gather each other's keys and values, which Megatron's refuses, too.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, pg_collection=pg_collection, **options)
        self.config = config
        self._cp_group = pg_collection.cp

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
        """Padded: as Megatron's. Packed: [N, heads/tp, d], keys and values with KV heads/tp, -> [N, heads/tp * d].

        Under context parallelism, N / cp instead of N.
        """
        if packed_seq_params is None:
            assert self._cp_group.size() == 1, "padded samples cannot be shared by context-parallel ranks"
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        assert isinstance(packed_seq_params, PackedSequences), "packs are described by mrl.backends.megatron.inputs"
        assert self.config.window_size is None, "packed sequences are not cut to attention windows"
        assert self.config.attention_dropout == 0.0
        assert self.softmax_offset is None
        lengths, scale = packed_seq_params.lengths, self.softmax_scale
        if self._cp_group.size() == 1:
            return attend_within(lengths, query, key, value, scale=scale)
        share, restore, positions = packed_seq_params.share, packed_seq_params.restore, packed_seq_params.positions
        assert share is not None
        assert restore is not None
        assert positions is not None
        # Ranks are not alike in what they do with the gathered keys: gradients are summed on their way back.
        joined = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=self._cp_group)
        key, value = joined[restore].chunk(2, dim=1)
        return attend_within(lengths, query, key, value, scale=scale, positions=positions[share])


def attend_within(
    lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor, *, scale: float, positions: Tensor | None = None
) -> Tensor:
    """Causal attention within each of the sequences that lie end to end.

    Args:
        lengths: of the sequences; their sum is N.
        query: [N, heads, d], or of every sequence an equal share, [n, heads, d].
        key, value: [N, KV heads, d].
        positions: [n], of a share's queries in their sequences.

    Returns:
        [N, heads * d] or [n, heads * d].
    """
    runs, cut = split_runs(lengths), len(key) // len(query)
    sizes = [sum(run) for run in runs]
    shares = [size // cut for size in sizes]
    places = [None] * len(runs) if positions is None else positions.split(shares)
    parts = zip(runs, query.split(shares), key.split(sizes), value.split(sizes), places, strict=True)
    return torch.cat([_attend(*part, scale=scale) for part in parts])


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


def _attend(
    lengths: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, *, scale: float
) -> Tensor:
    """Causal attention within sequences of similar `lengths`; arguments as of `attend_within`. -> [n, heads * d]."""
    keys = _Rows(lengths, key.device)
    queries = keys if positions is None else _Rows([length * len(query) // len(key) for length in lengths], key.device)
    mask = None
    if positions is not None:
        mask = torch.arange(keys.width, device=key.device) <= queries.spread(positions).unsqueeze(-1)
        mask = mask.unsqueeze(1)
    query, key, value = (
        rows.spread(tensor).transpose(1, 2) for rows, tensor in ((queries, query), (keys, key), (keys, value))
    )
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return queries.join(attended.transpose(1, 2).flatten(2))


class _Rows:
    """Sequences that lie end to end, as the rows of a rectangle."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.width = max(lengths)
        self._count = len(lengths)
        self._inside: Tensor | None = None
        if min(lengths) < self.width:
            sizes = torch.tensor(lengths, device=device).unsqueeze(1)
            self._inside = torch.arange(self.width, device=device) < sizes

    def spread(self, tensor: Tensor) -> Tensor:
        """[n, ...] -> [count, width, ...], zero where a sequence is shorter."""
        shape = (self._count, self.width, *tensor.shape[1:])
        if self._inside is None:
            return tensor.view(shape)
        return tensor.new_zeros(shape).index_put((self._inside,), tensor)

    def join(self, tensor: Tensor) -> Tensor:
        """The way back."""
        return tensor.flatten(0, 1) if self._inside is None else tensor[self._inside]
