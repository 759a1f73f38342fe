"""Which trainer ranks hold which boxes of the checkpoint. Pure Python.

Ranks with equal exports (data-parallel replicas) are one shard: their parameters are looked up once, however many they
are, and so are the hosts that hold a box.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mrl.reshard.families import megatron_pieces
from mrl.reshard.layout import Piece, SourceBuffer, SourceParam, SourceRank, as_matrix
from mrl.reshard.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Trainer ranks that export the same parameters at the same places."""

    number: int
    ranks: list[SourceRank]


@dataclass(frozen=True, slots=True)
class Replica:
    """A shard's copy of a box: where its first byte lies and how far apart its rows are."""

    shard: Shard
    buffer: int
    offset: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a Hugging Face tensor; units are elements."""

    row: int
    col: int
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """All copies of one box."""

    tensor: str
    box: Box
    replicas: list[Replica] = field(default_factory=list)

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the shards that hold it: boxes with equal ones have equal choices."""
        return tuple(replica.shard.number for replica in self.replicas)


class SourceIndex:
    """All boxes of every Hugging Face tensor, each with its copies."""

    def __init__(self, holdings: Iterable[Holding]) -> None:
        by_tensor: dict[str, list[Holding]] = defaultdict(list)
        for holding in holdings:
            by_tensor[holding.tensor].append(holding)
        self._holdings = {
            tensor: sorted(each, key=lambda holding: (holding.box.row, holding.box.col))
            for tensor, each in by_tensor.items()
        }
        self._rows = {tensor: [holding.box.row for holding in each] for tensor, each in self._holdings.items()}
        self._tallest = {tensor: max(holding.box.rows for holding in each) for tensor, each in self._holdings.items()}

    @classmethod
    def build(cls, spec: ModelSpec, sources: Sequence[SourceRank], element_size: int) -> SourceIndex:
        """The index of what the sources hold.

        Raises:
            ValueError: a parameter outside its buffer, an unknown name or a shape that does not fit.
        """
        holdings: dict[tuple[str, Box], Holding] = {}
        for shard in _shards(sources):
            for param in shard.ranks[0].params:
                _add(spec, shard, param, element_size, holdings)
        return cls(holdings.values())

    @property
    def holdings(self) -> list[Holding]:
        """Every box."""
        return [holding for each in self._holdings.values() for holding in each]

    def overlapping(self, piece: Piece) -> Iterator[Holding]:
        """Boxes that share elements with a piece of the target, in row order."""
        holdings = self._holdings.get(piece.tensor, [])
        if not holdings:
            return
        first = bisect_left(self._rows[piece.tensor], piece.row - self._tallest[piece.tensor] + 1)
        for index in range(first, len(holdings)):
            box = holdings[index].box
            if box.row >= piece.row + piece.rows:
                return
            if box.row + box.rows > piece.row and box.col < piece.col + piece.cols and box.col + box.cols > piece.col:
                yield holdings[index]


def _shards(sources: Sequence[SourceRank]) -> list[Shard]:
    shards: dict[tuple[int, int, int, int, int, tuple[int, ...]], Shard] = {}
    tables: dict[tuple[SourceParam, ...], int] = {}
    # By identity first: hashing a long table for every rank would take longer than all the rest.
    known: dict[int, int] = {}
    for source in sorted(sources, key=lambda source: source.rank):
        table = known.get(id(source.params))
        if table is None:
            table = known[id(source.params)] = tables.setdefault(source.params, len(tables))
        sizes = tuple(buffer.num_bytes for buffer in source.buffers)
        key = table, source.tp_rank, source.tp_size, source.etp_rank, source.etp_size, sizes
        shards.setdefault(key, Shard(len(shards), [])).ranks.append(source)
    return list(shards.values())


def _add(
    spec: ModelSpec, shard: Shard, param: SourceParam, element_size: int, holdings: dict[tuple[str, Box], Holding]
) -> None:
    first = shard.ranks[0]
    rows, cols = as_matrix(param.shape)
    pitch = cols * element_size
    _check_in_buffer(first, param, rows * pitch, first.buffers)
    for piece in source_pieces(spec, first, param):
        offset = param.offset_bytes + piece.local_row * pitch + piece.local_col * element_size
        box = Box(piece.row, piece.col, piece.rows, piece.cols)
        holding = holdings.setdefault((piece.tensor, box), Holding(piece.tensor, box))
        holding.replicas.append(Replica(shard, param.buffer, offset, pitch))


def source_pieces(spec: ModelSpec, source: SourceRank, param: SourceParam) -> list[Piece]:
    """Where a parameter of a trainer rank's export lies in the checkpoint."""
    return megatron_pieces(
        spec,
        param.name,
        param.shape,
        tp_rank=source.tp_rank,
        tp_size=source.tp_size,
        etp_rank=source.etp_rank,
        etp_size=source.etp_size,
    )


def _check_in_buffer(source: SourceRank, param: SourceParam, num_bytes: int, buffers: Sequence[SourceBuffer]) -> None:
    if not 0 <= param.buffer < len(buffers):
        raise ValueError(
            f"trainer rank {source.rank} lists {param.name} in buffer {param.buffer}, but exports {len(buffers)} "
            "buffers"
        )
    room = buffers[param.buffer].num_bytes
    if param.offset_bytes < 0 or param.offset_bytes + num_bytes > room:
        raise ValueError(
            f"trainer rank {source.rank}: {param.name} at byte {param.offset_bytes} with {num_bytes} bytes leaves "
            f"buffer {param.buffer} of {room} bytes"
        )
