"""Copies as the ops take them: (source address, source pitch, destination address, its pitch, rows, bytes in a row)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mrl.reshard.operations import CopyOp, Fill

Descriptor = tuple[int, int, int, int, int, int]
_POSITION_BYTES = 16
"""Positions of operations in a checksum are multiples of this."""


def describe_copies(
    copies: Iterable[CopyOp], buffers: Mapping[tuple[int, int], Tensor], params: Mapping[str, Tensor]
) -> list[Descriptor]:
    """Copies from the trainer's buffers into the engine rank's parameters."""
    return [
        (
            buffers[op.src_rank, op.src_buffer].data_ptr() + op.src_offset,
            op.src_pitch,
            params[op.dst_param].data_ptr() + op.dst_offset,
            op.dst_pitch,
            op.rows,
            op.row_bytes,
        )
        for op in copies
    ]


def describe_fills(fills: Iterable[Fill], params: Mapping[str, Tensor]) -> list[Descriptor]:
    """Runs of zeros in the engine rank's parameters."""
    return [
        (0, 0, params[fill.dst_param].data_ptr() + fill.dst_offset, fill.num_bytes, 1, fill.num_bytes) for fill in fills
    ]


def describe_served(copies: Iterable[CopyOp], buffers: Mapping[tuple[int, int], Tensor]) -> list[Descriptor]:
    """The trainer's side of copies that another engine rank makes, to be summed: what is read stands on both sides."""
    found = []
    for op in copies:
        address = buffers[op.src_rank, op.src_buffer].data_ptr() + op.src_offset
        found.append((address, op.src_pitch, address, op.src_pitch, op.rows, op.row_bytes))
    return found


def cut(op: Descriptor, most_bytes: int) -> Iterator[Descriptor]:
    """The same copy in parts of about `most_bytes`, a multiple of 16; its bytes keep their places in a checksum."""
    src, src_pitch, dst, dst_pitch, rows, row_bytes = op
    if rows == 1 or src_pitch == dst_pitch == row_bytes:
        total = rows * row_bytes
        for left in range(0, total, most_bytes):
            size = min(most_bytes, total - left)
            yield src + left, size, dst + left, size, 1, size
        return
    step = _POSITION_BYTES // math.gcd(_POSITION_BYTES, row_bytes)
    group = max(most_bytes // (row_bytes * step), 1) * step
    for row in range(0, rows, group):
        yield src + row * src_pitch, src_pitch, dst + row * dst_pitch, dst_pitch, min(group, rows - row), row_bytes


def table(descriptors: Sequence[Descriptor]) -> Tensor:
    """[num_ops, 6] int64 on CPU, also of none."""
    return torch.tensor(descriptors, dtype=torch.int64).reshape(-1, 6)
