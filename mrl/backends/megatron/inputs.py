"""What a micro-batch looks like to the model, and the way back from the model's order of tokens to `[b, t]`.

A model sees samples padded to the longest of them, [b, t], or packed end to end, [1, N]. Its output at a position
predicts the next token; `ModelInputs.align` gives every entry to the token it belongs to, in either case [b, t], so
that nothing behind it knows how the samples ran.

Context-parallel ranks share a pack, [1, N / cp] each: every sequence is cut into 2 cp chunks of equal length, and rank
r has chunks r and 2 cp - 1 - r, so that under a causal mask all have the same work, as transformer-engine expects.
"""

from __future__ import annotations

import math
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
    share: Tensor | None = None
    """[N / cp] int64, places in the pack of the tokens that this context-parallel rank has, in its order."""
    restore: Tensor | None = None
    """[N] int64, where each token of the pack lies once the shares of all ranks are joined."""


@dataclass(kw_only=True, frozen=True)
class ContextPlace:
    """One of the ranks that share every sequence."""

    rank: int = 0
    size: int = 1


_ALONE = ContextPlace()


@dataclass(kw_only=True, frozen=True)
class ModelInputs:
    """Arguments of the model for one micro-batch."""

    tokens: Tensor
    """[b, t] or [1, N / cp] int64."""
    targets: Tensor
    """The token that each position predicts, shape of `tokens`; arbitrary where `align` drops the prediction."""
    positions: Tensor
    """Of each token in its sample; shape of `tokens`."""
    samples: Tensor
    """Of each token, its sample in the micro-batch, or b where it is padding behind them; shape of `tokens`."""
    packed: PackedSequences | None
    """None where samples are padded."""
    rows: Tensor
    """[M] int64; of every position here whose prediction belongs to a token, that token's sample."""
    columns: Tensor
    """[M] int64; that token's position in the sample."""
    sources: Tensor
    """[M] int64; the predicting position in the flattened `tokens`."""
    shape: tuple[int, int]
    """(b, t) of the micro-batch."""

    def align(self, predicted: Tensor) -> Tensor:
        """From the position that predicts to the token predicted. Shape of `tokens` -> [b, t]; entry 0 and padding 0.

        Entries that another context-parallel rank predicts are 0, too. Differentiable; no value but those it keeps
        takes part in the gradient.
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
        targets=batch.tokens.roll(-1, dims=1),
        positions=positions,
        samples=torch.arange(len(batch), device=positions.device).unsqueeze(1).expand_as(positions),
        packed=None,
        rows=rows,
        columns=columns,
        sources=rows * width + columns - 1,
        shape=(len(batch), width),
    )


def packed_inputs(batch: TrainBatch, *, multiple: int = 1, place: ContextPlace = _ALONE) -> ModelInputs:
    """The samples end to end, [1, N], or this rank's share of them, [1, N / cp].

    There is no padding but for a last sequence of it, and under context parallelism at the end of every sequence.

    Args:
        multiple: of the width: tp under sequence parallelism, which splits it evenly.
        place: among the ranks that share every sequence.
    """
    lengths = _sequence_lengths(batch.lengths.tolist(), multiple, place.size)
    sizes, own = (torch.tensor(each, device=batch.tokens.device) for each in (lengths, batch.lengths.tolist()))
    rows = torch.repeat_interleave(sizes, output_size=sum(lengths))
    columns = torch.arange(rows.numel(), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]
    real = columns < torch.nn.functional.pad(own, (0, len(sizes) - len(own)))[rows]
    tokens = torch.zeros_like(rows)
    tokens[real] = batch.tokens[rows[real], columns[real]]
    share, restore = _share_out(columns, sizes[rows], place)
    # Every real token but a sequence's first is predicted, by the place before it.
    predicts = (real & (columns > 0)).roll(-1)[share]
    sources = share[predicts]
    return ModelInputs(
        tokens=tokens[share].unsqueeze(0),
        targets=tokens.roll(-1)[share].unsqueeze(0),
        positions=columns[share].unsqueeze(0),
        samples=rows[share].unsqueeze(0),
        packed=_describe(lengths, columns, share, restore),
        rows=rows[sources],
        columns=columns[sources] + 1,
        sources=predicts.nonzero().squeeze(1),
        shape=(len(batch), batch.tokens.shape[1]),
    )


def _sequence_lengths(lengths: list[int], multiple: int, cp: int) -> list[int]:
    """Of the sequences in the pack: the samples' own, rounded up to be shared, and a last one of padding if needed.

    Padding gets a sequence of its own: kernels leave positions that belong to none uninitialised.
    """
    unit = 2 * cp if cp > 1 else 1
    rounded = [-(-length // unit) * unit for length in lengths]
    padding = -sum(rounded) % math.lcm(unit, cp * multiple)
    return rounded + ([padding] if padding else [])


def _share_out(columns: Tensor, sizes: Tensor, place: ContextPlace) -> tuple[Tensor, Tensor]:
    """`PackedSequences.share` and `.restore`, from every place's position in its sequence and that one's length."""
    last = 2 * place.size - 1
    chunks = columns * (2 * place.size) // sizes
    # Stable: a rank's places keep their order, chunk by chunk and sequence by sequence.
    joined = chunks.minimum(last - chunks).argsort(stable=True)
    return joined.view(place.size, -1)[place.rank], joined.argsort()


def _describe(lengths: list[int], positions: Tensor, share: Tensor, restore: Tensor) -> PackedSequences:
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
        share=share,
        restore=restore,
    )
