"""What every source of weights looks like to the tools: tensors under Hugging Face names, read in boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from mrl.convert.errors import DamageError
from mrl.reshard.layout import Piece

BLOCK_BYTES = 8 * 2**20
"""Tensors are streamed in blocks of about this size: small enough for the allocator to use memory again."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """As a matrix: [n] counts as [n, 1]."""
        return self.numel // self.rows if self.rows else 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights(Protocol):
    """Tensors in files; a context manager that closes them."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        ...

    def read_into(self, target: Tensor, name: str, row: int, col: int) -> None:
        """Fill `target`, [rows, cols] of the tensor's type, with the box of `name` that begins at (row, col)."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def check_tensors(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DamageError naming the first tensor that is missing or has another shape."""
    for name, expected in shapes.items():
        if name not in weights.tensors:
            raise DamageError(f"{weights.path}: tensor {name} is missing from the checkpoint")
        shape = weights.tensors[name].shape
        if shape != expected:
            raise DamageError(
                f"{weights.path}: tensor {name} has shape {list(shape)}, but config.json gives {list(expected)}"
            )


def read_piece(weights: Weights, piece: Piece) -> Tensor:
    """The piece's box, [rows, cols], in the stored type."""
    box = torch.empty(piece.rows, piece.cols, dtype=weights.tensors[piece.tensor].dtype)
    weights.read_into(box, piece.tensor, piece.row, piece.col)
    return box


def read_rows(weights: Weights, name: str, rows: range) -> Tensor:
    """Whole rows of a tensor, [rows, cols], in the stored type."""
    info = weights.tensors[name]
    block = torch.empty(len(rows), info.cols, dtype=info.dtype)
    weights.read_into(block, name, rows.start, 0)
    return block


def row_blocks(info: TensorInfo, num_bytes: int = BLOCK_BYTES) -> Iterator[range]:
    """The tensor's rows in runs of about `num_bytes`."""
    step = max(1, num_bytes // max(1, info.cols * info.dtype.itemsize))
    for start in range(0, info.rows, step):
        yield range(start, min(info.rows, start + step))


def assemble(
    target: Tensor, row: int, col: int, pieces: Iterable[Piece], read: Callable[[Tensor, str, int, int], None]
) -> None:
    """Fill `target`, the box at (row, col) of a matrix, from the pieces of the matrix that meet it.

    Args:
        pieces: `local_row` and `local_col` are places in the matrix.
        read: fills a tensor with the box of a named tensor at a row and column.

    Raises:
        DamageError: the pieces do not cover the box.
    """
    missing = target.numel()
    bottom, right = row + target.shape[0], col + target.shape[1]
    for piece in pieces:
        top, end = max(row, piece.local_row), min(bottom, piece.local_row + piece.rows)
        left, stop = max(col, piece.local_col), min(right, piece.local_col + piece.cols)
        if top < end and left < stop:
            part = target[top - row : end - row, left - col : stop - col]
            read(part, piece.tensor, piece.row + top - piece.local_row, piece.col + left - piece.local_col)
            missing -= part.numel()
    if missing:
        raise DamageError(f"{missing} of {target.numel()} elements at row {row}, column {col} are stored nowhere")
