"""What an engine's parameters and the trainer's boxes have in common, as copies. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mrl.reshard.families import sglang_pieces
from mrl.reshard.layout import Piece, TargetParam
from mrl.reshard.operations import CopyOp
from mrl.reshard.sources import Holding, Replica, SourceIndex
from mrl.reshard.spec import ModelSpec


@dataclass(kw_only=True, frozen=True)
class EngineModel:
    """The model that every engine of the job holds, cut over `tp_size` ranks."""

    spec: ModelSpec
    targets: Sequence[TargetParam]
    """Of one rank; names and shapes are the same on all."""
    tp_size: int
    ep_size: int

    def pieces(self, target: TargetParam, tp_rank: int) -> list[Piece]:
        """Where that rank's parameter lies in the checkpoint; ValueError if its shape does not fit."""
        return sglang_pieces(
            self.spec, target.name, target.shape, tp_rank=tp_rank, tp_size=self.tp_size, ep_size=self.ep_size
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Elements that a parameter and a box of the sources share."""

    target: TargetParam
    holding: Holding
    row: int
    """Of the first element in the box, as `col`."""
    col: int
    rows: int
    row_bytes: int
    dst_offset: int
    """Of the first element in the parameter, in bytes."""

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes

    def copy_from(self, replica: Replica, source_rank: int) -> CopyOp:
        """The copy from one of the box's replicas, in this rank's buffers."""
        return CopyOp(
            src_rank=source_rank,
            src_buffer=replica.buffer,
            src_offset=replica.offset + self.row * replica.pitch + self.col * self.target.element_size,
            src_pitch=replica.pitch,
            dst_param=self.target.name,
            dst_offset=self.dst_offset,
            dst_pitch=self.target.row_bytes,
            rows=self.rows,
            row_bytes=self.row_bytes,
        )


def overlaps(target: TargetParam, pieces: Sequence[Piece], index: SourceIndex) -> Iterator[Overlap]:
    """All that the pieces of a parameter share with the sources' boxes, piece by piece, then by row."""
    size, dst_pitch = target.element_size, target.row_bytes
    for piece in pieces:
        for holding in index.overlapping(piece):
            box = holding.box
            row, col = max(box.row, piece.row), max(box.col, piece.col)
            yield Overlap(
                target=target,
                holding=holding,
                row=row - box.row,
                col=col - box.col,
                rows=min(box.row + box.rows, piece.row + piece.rows) - row,
                row_bytes=(min(box.col + box.cols, piece.col + piece.cols) - col) * size,
                dst_offset=(piece.local_row + row - piece.row) * dst_pitch + (piece.local_col + col - piece.col) * size,
            )
