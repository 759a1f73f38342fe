"""The proof that a plan writes every byte of a parameter exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from mrl.reshard.layout import TargetParam


@dataclass(frozen=True, slots=True)
class ByteBox:
    """Bytes [left, right) of the rows [top, bottom) of a parameter."""

    top: int
    bottom: int
    left: int
    right: int


def boxes_of(param: TargetParam, offset: int, pitch: int, rows: int, row_bytes: int) -> list[ByteBox]:
    """A strided write as boxes of the parameter's rows.

    Raises:
        ValueError: the write leaves the parameter, or its pitch is not the parameter's.
    """
    if offset < 0 or row_bytes < 1 or rows < 1 or offset + (rows - 1) * pitch + row_bytes > param.num_bytes:
        raise ValueError(
            f"parameter {param.name}: a write of {rows} rows x {row_bytes} bytes at byte {offset} with pitch {pitch} "
            f"leaves its {param.num_bytes} bytes"
        )
    if rows == 1 or pitch == row_bytes:
        return _flat_boxes(param.row_bytes, offset, offset + (rows - 1) * pitch + row_bytes)
    top, left = divmod(offset, param.row_bytes)
    if pitch != param.row_bytes or left + row_bytes > pitch:
        raise ValueError(
            f"parameter {param.name}: rows of {row_bytes} bytes at byte {offset} with pitch {pitch} do not lie in its "
            f"rows of {param.row_bytes} bytes"
        )
    return [ByteBox(top, top + rows, left, left + row_bytes)]


def _flat_boxes(width: int, start: int, stop: int) -> list[ByteBox]:
    """The bytes [start, stop) of consecutive rows: a partial row, whole rows, a partial row."""
    boxes = []
    while start < stop:
        top, left = divmod(start, width)
        bottom = stop // width if left == 0 and stop - start >= width else top + 1
        end = min(stop, bottom * width)
        boxes.append(ByteBox(top, bottom, left, width if bottom > top + 1 else left + end - start))
        start = end
    return boxes


def check_exact_cover(param: TargetParam, boxes: Iterable[ByteBox]) -> None:
    """Return if the boxes tile the parameter.

    Raises:
        ValueError: names the parameter and the first rows and bytes that are missing or written twice.
    """
    ordered = sorted(boxes, key=lambda box: (box.top, box.left))
    edges = sorted({0, param.rows, *(box.top for box in ordered), *(box.bottom for box in ordered)})
    active: list[ByteBox] = []
    upcoming = 0
    for top, bottom in pairwise(edges):
        active = [box for box in active if box.bottom > top]
        while upcoming < len(ordered) and ordered[upcoming].top <= top:
            active.append(ordered[upcoming])
            upcoming += 1
        _check_band(param, active, top, bottom)


def _check_band(param: TargetParam, active: list[ByteBox], top: int, bottom: int) -> None:
    at = 0
    for left, right in [*sorted((box.left, box.right) for box in active), (param.row_bytes, param.row_bytes)]:
        if left != at:
            what = "are written by no source rank" if left > at else "are written more than once"
            raise ValueError(
                f"parameter {param.name}: bytes [{min(left, at)}, {max(left, at)}) of rows [{top}, {bottom}) {what}; "
                "the sources must be one whole copy of the model, or whole replicas of it, in one layout"
            )
        at = right
