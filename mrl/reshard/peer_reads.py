"""What copy engines bring from other devices of the host: in portions, each of them summed while the next arrive.

No kernel sees these bytes on their way. What has arrived is summed in the parameters; what ought to have, by the engine
rank on the device it came from (`mrl.reshard.peer_sums`). Both count a word with its place in the reader's copies from
that device, in the plan's order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl import ops
from mrl.reshard.descriptors import Descriptor, cut, describe_copies, describe_served, table
from mrl.reshard.transfers import Transfer

PIECE_BYTES = 128 << 20
"""A copy is cut into pieces of this size: 0.3 ms of a link, so that several devices can be read in turns."""
_MOST_PORTIONS = 32
"""Only the last portions' sums are waited for; the host spends about 30 us on each portion."""
_LANES = 2
"""Streams that the portions take in turns: the link is busy while one of them starts a copy."""
_TILE_OP, _OP_BASE = 7, 32
"""Column of a tile: the index of its operation times 32, plus the width of its accesses."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Copies to be made together."""

    descriptors: Tensor
    """[num_copies, 6] int64 on CPU."""
    tiles: Mapping[int, Tensor]
    """Of the same bytes, by the engine rank on the device they come from; `mrl.ops.build_tiles`."""


def split_reads(
    reads: Sequence[Transfer],
    buffers: Mapping[tuple[int, int], Tensor],
    params: Mapping[str, Tensor],
    *,
    rank: int,
    piece_bytes: int,
) -> list[Portion]:
    """An engine rank's reads in portions of about equal size, none smaller than a piece; devices are read in turns."""
    pieces = {
        read.peer: [piece for op in describe_copies(read.copies, buffers, params) for piece in cut(op, piece_bytes)]
        for read in reads
    }
    # Ranks that start together start on different devices.
    ring = {owner: pieces[owner] for owner in sorted(pieces, key=lambda owner: (owner < rank, owner))}
    total = sum(read.num_bytes for read in reads)
    count = min(max(total // piece_bytes, 1), _MOST_PORTIONS)
    rows: dict[int, list[Descriptor]] = defaultdict(list)
    portion_of: dict[int, list[int]] = {owner: [] for owner in pieces}
    begun = 0
    for owner, piece in _in_turns(ring):
        portion = begun * count // total
        rows[portion].append(piece)
        portion_of[owner].append(portion)
        begun += _size(piece)
    tiles = {owner: ops.build_tiles(table(each)) for owner, each in pieces.items()}
    places = {owner: torch.tensor(portion_of[owner])[each[:, _TILE_OP] // _OP_BASE] for owner, each in tiles.items()}
    return [
        Portion(
            table(rows[portion]),
            {owner: tiles[owner][places[owner] == portion] for owner in tiles if portion in portion_of[owner]},
        )
        for portion in sorted(rows)
    ]


def served_tiles(serves: Sequence[Transfer], buffers: Mapping[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """Tiles over what other engine ranks read here, by the rank; their sum is that of what arrives there."""
    return {serve.peer: ops.build_tiles(table(describe_served(serve.copies, buffers))) for serve in serves}


class PeerReads:
    """Portions bound to the streams of their device."""

    def __init__(self, portions: Sequence[Portion], device: torch.device) -> None:
        self._portions = [
            Portion(portion.descriptors, {owner: tiles.to(device) for owner, tiles in portion.tiles.items()})
            for portion in portions
        ]
        self._token = torch.empty(0, device=device)
        self._lanes = [torch.cuda.Stream(device) for _ in range(min(_LANES, len(portions)))]
        self._copied = [torch.cuda.Event(enable_timing=True) for _ in portions]

    def begin(self, after: torch.cuda.Event) -> None:
        """Start the first copies once `after` is reached."""
        for lane in self._lanes:
            lane.wait_event(after)
        if self._portions:
            self._copy(0)

    def finish(self) -> list[tuple[int, Tensor]]:
        """Start the other copies, and have the current stream sum each portion when it is there.

        Returns the sums with the engine rank on the device that they come from: [1] int64 each.
        """
        sums = []
        for index, portion in enumerate(self._portions):
            if index:
                self._copy(index)
            self._copied[index].wait()
            sums += [(owner, ops.checksum(tiles, of_source=False)) for owner, tiles in portion.tiles.items()]
        return sums

    def seconds_since(self, start: torch.cuda.Event) -> float:
        """From `start` until the last byte was there; 0 if there was nothing to bring. All must be done."""
        return max((start.elapsed_time(event) for event in self._copied), default=0.0) / 1e3

    def _copy(self, index: int) -> None:
        with torch.cuda.stream(self._lanes[index % len(self._lanes)]):
            ops.copy_engine_copy_(self._token, self._portions[index].descriptors)
            self._copied[index].record()


def _in_turns(queues: Mapping[int, Sequence[Descriptor]]) -> Iterator[tuple[int, Descriptor]]:
    """All pieces, always of the device of which the smallest share is taken."""
    totals = {owner: sum(map(_size, queue)) for owner, queue in queues.items()}
    taken = dict.fromkeys(queues, 0)
    upcoming = {owner: iter(queue) for owner, queue in queues.items()}
    for _ in range(sum(map(len, queues.values()))):
        owner = min(
            (each for each in queues if taken[each] < totals[each]), key=lambda each: taken[each] / totals[each]
        )
        piece = next(upcoming[owner])
        taken[owner] += _size(piece)
        yield owner, piece


def _size(piece: Descriptor) -> int:
    return piece[4] * piece[5]
