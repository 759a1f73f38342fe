"""The ops in torch and Python, on any device: the definition that the compiled ones are tested against.

Same names, arguments and results as `torch.ops.mrl`. One torch copy for every tile: use large tiles.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from mrl.ops.reference_ipc import ipc_close, ipc_export, ipc_open

__all__ = [
    "batched_strided_copy_",
    "batched_strided_copy_checksum_",
    "build_tiles",
    "checksum",
    "copy_engine_copy_",
    "ipc_close",
    "ipc_export",
    "ipc_open",
    "tensor_from_ptr",
]

WIDTH_BASE = 32
WIDEST_ACCESS = 16
MAX_ACCESSES_PER_TILE = 1 << 16
CUT_ALIGNMENT = 128
_WORDS = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the tile tensor; see `mrl.ops.tiles.build_tiles`."""

    src: int
    src_pitch: int
    dst: int
    dst_pitch: int
    rows: int
    row_bytes: int
    position: int
    op_and_width: int

    @property
    def width(self) -> int:
        return self.op_and_width % WIDTH_BASE

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


def build_tiles(descriptors: Tensor, tile_bytes: int, sources: Tensor | None = None) -> Tensor:
    """See `mrl.ops.tiles.build_tiles`."""
    queues: dict[int, list[Tile]] = {}
    position = 0
    for index, (src, src_pitch, dst, dst_pitch, rows, row_bytes) in enumerate(descriptors.tolist()):
        source = 0 if sources is None else int(sources[index])
        op = _joined(Tile(src, src_pitch, dst, dst_pitch, rows, row_bytes, position, index * WIDTH_BASE))
        queues.setdefault(source, []).extend(_cut(op, tile_bytes))
        position += _ceil(rows * row_bytes, WIDEST_ACCESS) * WIDEST_ACCESS
    tiles = [_fields(tile) for tile in _interleave([queues[source] for source in sorted(queues)])]
    return torch.tensor(tiles, dtype=torch.int64).reshape(-1, 8)


def batched_strided_copy_(anchor: Tensor, tiles: Tensor) -> None:
    """See `mrl.ops.tiles.batched_strided_copy_`."""
    for tile in _tiles(tiles):
        target = _view(tile, tile.dst, tile.dst_pitch, tiles.device)
        if tile.src:
            target.copy_(_view(tile, tile.src, tile.src_pitch, tiles.device))
        else:
            target.zero_()


def batched_strided_copy_checksum_(anchor: Tensor, tiles: Tensor) -> Tensor:
    """See `mrl.ops.tiles.batched_strided_copy_checksum_`."""
    batched_strided_copy_(anchor, tiles)
    return checksum(tiles, True)


def checksum(tiles: Tensor, of_source: bool) -> Tensor:
    """See `mrl.ops.tiles.checksum`."""
    total = torch.zeros(1, dtype=torch.int64, device=tiles.device)
    for tile in _tiles(tiles):
        pointer, pitch = (tile.src, tile.src_pitch) if of_source else (tile.dst, tile.dst_pitch)
        if pointer:
            total += _sum_words(_view(tile, pointer, pitch, tiles.device), tile.position)
    return total


def copy_engine_copy_(anchor: Tensor, descriptors: Tensor) -> None:
    """See `mrl.ops.copy_engine.copy_engine_copy_`."""
    for src, src_pitch, dst, dst_pitch, rows, row_bytes in descriptors.tolist():
        op = _joined(Tile(src, src_pitch, dst, dst_pitch, rows, row_bytes, 0, 0))
        op = replace(op, op_and_width=_widest_access(op))
        _view(op, op.dst, op.dst_pitch, anchor.device).copy_(_view(op, op.src, op.src_pitch, anchor.device))


def tensor_from_ptr(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    """See `mrl.ops.cuda_ipc.tensor_from_ptr`."""
    if torch.device(device).type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(pointer), dtype=torch.uint8)
    interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 2}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _joined(op: Tile) -> Tile:
    """One long row where rows lie end to end on both sides."""
    if op.rows > 1 and op.dst_pitch == op.row_bytes and (op.src_pitch == op.row_bytes or not op.src):
        op = replace(op, rows=1, row_bytes=op.num_bytes)
    if op.rows == 1:
        op = replace(op, src_pitch=op.row_bytes, dst_pitch=op.row_bytes)
    return op if op.src else replace(op, src_pitch=0)


def _widest_access(op: Tile) -> int:
    pitches = (op.src_pitch, op.dst_pitch) if op.rows > 1 else ()
    return math.gcd(WIDEST_ACCESS, op.row_bytes, op.src, op.dst, *pitches)


def _cut(op: Tile, tile_bytes: int) -> Iterator[Tile]:
    width = _widest_access(op)
    op = replace(op, op_and_width=op.op_and_width + width)
    limit = min(tile_bytes, width * MAX_ACCESSES_PER_TILE)
    if op.row_bytes <= limit:
        group = _ceil(op.rows, _ceil(op.rows, limit // op.row_bytes))
        for row in range(0, op.rows, group):
            yield _part(op, row, min(group, op.rows - row), 0, op.row_bytes)
        return
    part = _ceil(op.row_bytes, _ceil(op.row_bytes, limit))
    part = min(limit, _ceil(part, CUT_ALIGNMENT) * CUT_ALIGNMENT)
    for row in range(op.rows):
        for left in range(0, op.row_bytes, part):
            yield _part(op, row, 1, left, min(part, op.row_bytes - left))


def _part(op: Tile, row: int, rows: int, left: int, row_bytes: int) -> Tile:
    return replace(
        op,
        src=op.src and op.src + row * op.src_pitch + left,
        dst=op.dst + row * op.dst_pitch + left,
        rows=rows,
        row_bytes=row_bytes,
        position=op.position + row * op.row_bytes + left,
    )


def _interleave(queues: list[list[Tile]]) -> Iterator[Tile]:
    totals = [sum(tile.num_bytes for tile in queue) for queue in queues]
    taken, upcoming = [0] * len(queues), [0] * len(queues)
    for _ in range(sum(map(len, queues))):
        waiting = [i for i, queue in enumerate(queues) if upcoming[i] < len(queue)]
        least = min(waiting, key=lambda i: (taken[i] / totals[i], i))
        tile = queues[least][upcoming[least]]
        upcoming[least] += 1
        taken[least] += tile.num_bytes
        yield tile


def _fields(tile: Tile) -> list[int]:
    return [getattr(tile, name) for name in Tile.__slots__]


def _tiles(tiles: Tensor) -> Iterator[Tile]:
    return (Tile(*row) for row in tiles.tolist())


def _view(tile: Tile, pointer: int, pitch: int, device: torch.device) -> Tensor:
    """[rows, words] of the tile's widest word."""
    dtype = _WORDS[tile.width]
    pitch = pitch if tile.rows > 1 else tile.row_bytes
    memory = tensor_from_ptr(pointer, (tile.rows - 1) * pitch + tile.row_bytes, device).view(dtype)
    return memory.as_strided((tile.rows, tile.row_bytes // dtype.itemsize), (pitch // dtype.itemsize, 1))


def _sum_words(run: Tensor, position: int) -> Tensor:
    run = run.contiguous().view(torch.uint8).flatten()
    before = position % 8
    padded = torch.nn.functional.pad(run, (before, -(before + run.numel()) % 8))
    words = padded.view(torch.int64)
    index = torch.arange(words.numel(), device=run.device) + position // 8
    return (words * _multiplier(index)).sum()


def _multiplier(index: Tensor) -> Tensor:
    mixed = (index + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    return (mixed * _signed(0xD6E8FEB86659FD93)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64)
