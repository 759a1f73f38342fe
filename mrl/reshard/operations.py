"""What an executor does: strided copies and zero fills. Units are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CopyOp:
    """`rows` runs of `row_bytes` bytes from a source buffer into a parameter; all units are bytes."""

    src_rank: int
    src_buffer: int
    src_offset: int
    src_pitch: int
    dst_param: str
    dst_offset: int
    dst_pitch: int
    rows: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Fill:
    """A run of bytes of a parameter set to zero: vocabulary rows past the model's."""

    dst_param: str
    dst_offset: int
    num_bytes: int


def coalesce(copies: Iterable[CopyOp]) -> Iterator[CopyOp]:
    """The same copies with contiguous rows joined, and neighbours that continue each other merged."""
    last: CopyOp | None = None
    for op in map(_flatten, copies):
        merged = _merge(last, op) if last else None
        if last and merged is None:
            yield last
        last = merged or op
    if last:
        yield last


def _flatten(op: CopyOp) -> CopyOp:
    """One long row where the rows lie end to end on both sides."""
    if op.rows > 1 and op.src_pitch == op.dst_pitch == op.row_bytes:
        size = op.num_bytes
        return replace(op, src_pitch=size, dst_pitch=size, rows=1, row_bytes=size)
    if op.rows == 1:
        return replace(op, src_pitch=op.row_bytes, dst_pitch=op.row_bytes)
    return op


def _merge(first: CopyOp, second: CopyOp) -> CopyOp | None:
    """Both as one operation, or None if the second does not continue the first on both sides."""
    if (first.src_rank, first.src_buffer, first.dst_param) != (second.src_rank, second.src_buffer, second.dst_param):
        return None
    src_step, dst_step = second.src_offset - first.src_offset, second.dst_offset - first.dst_offset
    if first.rows == second.rows == 1:
        if src_step == dst_step == first.row_bytes:
            size = first.row_bytes + second.row_bytes
            return replace(first, src_pitch=size, dst_pitch=size, row_bytes=size)
        return None
    same_rows = (first.src_pitch, first.dst_pitch, first.row_bytes) == (
        second.src_pitch,
        second.dst_pitch,
        second.row_bytes,
    )
    if same_rows and src_step == first.rows * first.src_pitch and dst_step == first.rows * first.dst_pitch:
        return replace(first, rows=first.rows + second.rows)
    return None
