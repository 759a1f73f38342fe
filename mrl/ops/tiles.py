"""A plan of strided copies over raw addresses: cut into tiles once, then replayed and summed in one launch each.

Addresses are trusted: memory that was freed, or is not mapped on the tiles' device, faults. All launches go to the
current stream of the tiles' device and do not wait for it.
"""

from __future__ import annotations

from torch import Tensor

from mrl.ops.extension import backend

TILE_BYTES = 32 * 1024
"""The size that measured best on an H100; see docs/csrc.md."""


def build_tiles(descriptors: Tensor, *, tile_bytes: int = TILE_BYTES, sources: Tensor | None = None) -> Tensor:
    """Cut a plan into tiles in the order in which they are best copied. Runs on the CPU; move the result to a device.

    Rows that lie end to end on both sides are joined. Tiles of different sources are interleaved by bytes, so that
    local memory and the links to peers are busy together, from the first tile to the last. Each tile notes the widest
    access (16, 8, 4, 2 or 1 bytes) that its addresses, pitches and row size allow.

    Args:
        descriptors: [num_ops, 6] int64 on CPU: source address (0 fills with zeros), source pitch, destination address,
            destination pitch, rows, bytes in a row. Destinations must not overlap each other or a source.
        tile_bytes: upper bound of a tile; a multiple of 128, at most 1 MiB.
        sources: [num_ops] int64 on CPU, any number that tells sources (ranks) apart; None: all are one.

    Returns:
        [num_tiles, 8] int64 on CPU: source address, source pitch, destination address, destination pitch, rows, bytes
        in a row, position of the first byte in the plan, index of the operation * 32 + access width. Rows can be
        selected or sliced: what is left is a smaller plan with the same positions.

    Raises:
        RuntimeError: shape, dtype, device or tile size is not as above, or an operation is no strided copy.
    """
    return backend().build_tiles(descriptors, tile_bytes, sources)


def batched_strided_copy_(anchor: Tensor, tiles: Tensor) -> None:
    """Copy all tiles; returns once the copy is in the stream of `tiles.device` (on CPU: when done).

    Args:
        anchor: any tensor on `tiles.device`. The op is declared to write it, which keeps its place among other ops
            under torch.compile; nothing is written to it. Give a token, not a parameter: a compiler may clone it.
        tiles: [num_tiles, 8] int64 from `build_tiles`, on the device that holds the destination.

    Raises:
        RuntimeError: shape, dtype or device is not as above, or the launch failed.
    """
    backend().batched_strided_copy_(anchor, tiles)


def batched_strided_copy_checksum_(anchor: Tensor, tiles: Tensor) -> Tensor:
    """Copy all tiles and return the checksum of the bytes as they were read: [1] int64 on `tiles.device`.

    Arguments and errors as in `batched_strided_copy_`. Equal to `checksum(tiles, of_source=True)` if nobody wrote the
    source meanwhile, and to `checksum(tiles, of_source=False)` afterwards if every byte arrived.
    """
    return backend().batched_strided_copy_checksum_(anchor, tiles)


def checksum(tiles: Tensor, *, of_source: bool) -> Tensor:
    """Sum of word * multiplier(position of the word in the plan), modulo 2^64: [1] int64 on `tiles.device`.

    Words are 8 bytes. The sum is the same on every device, for every tile size and order. A change of one word is
    always seen; several changed words, or words that changed places, up to a chance of about 2^-63. Zero fills add
    nothing on the source's side.

    Args:
        tiles: as in `batched_strided_copy_`.
        of_source: sum what lies at the sources; otherwise, what lies at the destinations.
    """
    return backend().checksum(tiles, of_source)
