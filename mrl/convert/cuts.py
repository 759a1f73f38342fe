"""How the whole parameters of a model are cut into the boxes that the ranks of a layout hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mrl.convert.names import Parameter, expert_of
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import VOCABULARY_PARAMS, expected_megatron_shape, megatron_pieces
from mrl.reshard.hf_export import stage_of_unit, unit_of
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Box:
    """Rows and columns of a whole parameter; a vector has one column."""

    row: int
    col: int
    rows: int
    cols: int


def whole_pieces(spec: ModelSpec, parameter: Parameter) -> list[Piece]:
    """The Hugging Face boxes that make the whole parameter."""
    return megatron_pieces(spec, parameter.name, parameter.shape, tp_rank=0, tp_size=1)


def boxes_of_ranks(spec: ModelSpec, parameter: Parameter, tp_size: int) -> list[list[Box]]:
    """For each tensor-parallel rank the boxes of the parameter that it is the first to hold, in its local order.

    Together they are the parameter, once; padded vocabulary rows are in none. Experts are not cut: the ranks take
    turns with them.

    Raises:
        ValueError: the size does not divide the parameter.
    """
    name = parameter.name
    whole = whole_pieces(spec, parameter)
    vocabulary = -(-spec.vocab_size // tp_size) * tp_size if name in VOCABULARY_PARAMS else None
    local_shape = expected_megatron_shape(spec, name, tp_size=tp_size, padded_vocab_size=vocabulary)
    seen: set[Box] = set()
    ranks = []
    for tp_rank in range(tp_size):
        pieces = megatron_pieces(spec, name, local_shape, tp_rank=tp_rank, tp_size=tp_size)
        boxes = _joined(box for piece in pieces for box in _boxes_in_whole(piece, whole))
        ranks.append([box for box in boxes if box not in seen])
        seen.update(boxes)
    expert = expert_of(parameter)
    if expert is not None and spec.moe:
        turn = expert * tp_size // spec.moe.num_experts
        ranks[0], ranks[turn] = ranks[turn], ranks[0]
    return ranks


def stage_of(spec: ModelSpec, pieces: list[Piece], layout: ParallelLayout) -> int:
    """The pipeline stage that holds a parameter made of these Hugging Face boxes."""
    return stage_of_unit(unit_of(pieces[0].tensor, spec), spec, layout)


def _boxes_in_whole(piece: Piece, whole: list[Piece]) -> Iterator[Box]:
    """A rank's Hugging Face box as boxes of the whole parameter."""
    for other in whole:
        if other.tensor != piece.tensor:
            continue
        top, bottom = max(piece.row, other.row), min(piece.row + piece.rows, other.row + other.rows)
        left, right = max(piece.col, other.col), min(piece.col + piece.cols, other.col + other.cols)
        if top < bottom and left < right:
            row, col = other.local_row + top - other.row, other.local_col + left - other.col
            yield Box(row, col, bottom - top, right - left)


def _joined(boxes: Iterator[Box]) -> list[Box]:
    """Boxes that follow one another downwards made one."""
    joined: list[Box] = []
    for box in boxes:
        last = joined[-1] if joined else None
        if last and (last.col, last.cols) == (box.col, box.cols) and last.row + last.rows == box.row:
            joined[-1] = Box(last.row, last.col, last.rows + box.rows, last.cols)
        else:
            joined.append(box)
    return joined
