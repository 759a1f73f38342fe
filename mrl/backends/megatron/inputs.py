"""What a micro-batch looks like to the model, and the way back from the model's order of tokens to `[b, t]`.

A model sees samples padded to the longest of them, [b, t], or packed end to end, [1, N]. Its output at a position
predicts the next token; `ModelInputs.align` gives every entry to the token it belongs to, in either case [b, t], so
that nothing behind it knows how the samples ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mrl.types import TrainBatch


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with what `SequenceAttention` needs to run them together."""

    lengths: tuple[int, ...] = ()
    """Of every sequence; the last may be padding."""
    positions: Tensor | None = None
    """[N] int64, of each token in its sequence."""


@dataclass(kw_only=True, frozen=True)
class ModelInputs:
    """Arguments of the model for one micro-batch."""

    tokens: Tensor
    """[b, t] or [1, N] int64."""
    positions: Tensor
    """Of each token in its sample; shape of `tokens`."""
    packed: PackedSequences | None
    """None where samples are padded."""
    rows: Tensor
    """[M] int64; of every position whose prediction belongs to a token, that token's sample."""
    columns: Tensor
    """[M] int64; that token's position in the sample."""
    sources: Tensor
    """[M] int64; the predicting position in the flattened `tokens`."""
    shape: tuple[int, int]
    """(b, t) of the micro-batch."""

    @property
    def targets(self) -> Tensor:
        """The token that each position predicts, shape of `tokens`; arbitrary where `align` drops the prediction."""
        return self.tokens.roll(-1, dims=1)

    def align(self, predicted: Tensor) -> Tensor:
        """From the position that predicts to the token predicted. Shape of `tokens` -> [b, t]; entry 0 and padding 0.

        Differentiable; no value but those it keeps takes part in the gradient.
        """
        aligned = predicted.new_zeros(self.shape)
        return aligned.index_put((self.rows, self.columns), predicted.flatten()[self.sources])


def padded_inputs(batch: TrainBatch) -> ModelInputs:
    """The samples as they are, [b, t]."""
    width = batch.tokens.shape[1]
    positions = torch.arange(width, device=batch.tokens.device).expand_as(batch.tokens)
    rows, columns = (positions < batch.lengths.unsqueeze(1)).logical_and(positions > 0).nonzero(as_tuple=True)
    return ModelInputs(
        tokens=batch.tokens,
        positions=positions,
        packed=None,
        rows=rows,
        columns=columns,
        sources=rows * width + columns - 1,
        shape=(len(batch), width),
    )


def packed_inputs(batch: TrainBatch, *, multiple: int = 1) -> ModelInputs:
    """The samples end to end, [1, N], without padding but for a last sequence of it that makes N a multiple.

    Args:
        multiple: that of tp under sequence parallelism, which splits the sequence evenly.
    """
    device = batch.tokens.device
    positions = torch.arange(batch.tokens.shape[1], device=device).expand_as(batch.tokens)
    rows, columns = (positions < batch.lengths.unsqueeze(1)).nonzero(as_tuple=True)
    padding = -rows.numel() % multiple
    lengths = batch.lengths.tolist() + ([padding] if padding else [])
    # Padding gets a sequence of its own: kernels leave positions that belong to none uninitialised.
    tokens = torch.nn.functional.pad(batch.tokens[rows, columns], (0, padding))
    packed_positions = torch.cat([columns, torch.arange(padding, device=device)])
    predicted = columns > 0
    return ModelInputs(
        tokens=tokens.unsqueeze(0),
        positions=packed_positions.unsqueeze(0),
        packed=_describe(lengths, packed_positions),
        rows=rows[predicted],
        columns=columns[predicted],
        sources=predicted.nonzero().squeeze(1) - 1,
        shape=(len(batch), batch.tokens.shape[1]),
    )


def _describe(lengths: list[int], positions: Tensor) -> PackedSequences:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(positions.device)
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        positions=positions,
    )
