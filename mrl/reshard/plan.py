"""Which bytes an engine rank copies from which trainer buffers. Pure Python: no torch, process group or engine.

Both sides are described as boxes of Hugging Face tensors; the plan is their intersection, checked to write every byte
of every parameter exactly once.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mrl.reshard.coverage import boxes_of, check_exact_cover
from mrl.reshard.families import VOCABULARY_PARAMS, megatron_pieces, sglang_pieces
from mrl.reshard.layout import Piece, SourceParam, SourceRank, TargetParam, as_matrix
from mrl.reshard.operations import CopyOp, Fill, coalesce
from mrl.reshard.spec import ModelSpec


@dataclass(kw_only=True, frozen=True)
class PlanStats:
    """Sizes of a plan, for logs and rooflines."""

    copies: int
    fills: int
    bytes: int
    """Copied; fills not counted."""
    fill_bytes: int
    local_bytes: int
    """Copied from memory of the target's own device and host."""
    bytes_by_source: dict[int, int]


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Everything one engine rank does in one reshard."""

    tp_rank: int
    tp_size: int
    targets: tuple[TargetParam, ...]
    copies: tuple[CopyOp, ...]
    fills: tuple[Fill, ...]
    stats: PlanStats
    digest: str
    """SHA-256 of the operations: equal inputs give equal plans, in any process."""


@dataclass(frozen=True, slots=True)
class _Replica:
    """One rank's copy of a box: where its first byte lies and how far apart its rows are."""

    source: SourceRank
    buffer: int
    offset: int
    pitch: int


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of a Hugging Face tensor; units are elements."""

    row: int
    col: int
    rows: int
    cols: int


class _SourceIndex:
    """All boxes of every Hugging Face tensor that the sources hold, each with its replicas."""

    def __init__(self, spec: ModelSpec, sources: Sequence[SourceRank], element_size: int) -> None:
        self._spec = spec
        self._element_size = element_size
        # Data-parallel replicas hold the same parameters: each is looked up in the tables once.
        self._pieces: dict[tuple[str, tuple[int, ...], int, int], list[Piece]] = {}
        replicas: dict[str, dict[_Box, list[_Replica]]] = defaultdict(lambda: defaultdict(list))
        for source in sources:
            for param in source.params:
                self._add(source, param, replicas)
        self._boxes = {
            tensor: sorted(boxes.items(), key=lambda item: (item[0].row, item[0].col))
            for tensor, boxes in replicas.items()
        }
        self._rows = {tensor: [box.row for box, _ in boxes] for tensor, boxes in self._boxes.items()}
        self._tallest = {tensor: max(box.rows for box, _ in boxes) for tensor, boxes in self._boxes.items()}

    def _add(self, source: SourceRank, param: SourceParam, replicas: dict[str, dict[_Box, list[_Replica]]]) -> None:
        rows, cols = as_matrix(param.shape)
        pitch = cols * self._element_size
        _check_in_buffer(source, param, rows * pitch)
        for piece in self._pieces_of(source, param):
            offset = param.offset_bytes + piece.local_row * pitch + piece.local_col * self._element_size
            box = _Box(piece.row, piece.col, piece.rows, piece.cols)
            replicas[piece.tensor][box].append(_Replica(source, param.buffer, offset, pitch))

    def _pieces_of(self, source: SourceRank, param: SourceParam) -> list[Piece]:
        tp_rank, tp_size = source.tp_rank, source.tp_size
        key = (param.name, param.shape, tp_rank, tp_size)
        if key not in self._pieces:
            self._pieces[key] = megatron_pieces(self._spec, param.name, param.shape, tp_rank=tp_rank, tp_size=tp_size)
        return self._pieces[key]

    def overlapping(self, piece: Piece) -> Iterator[tuple[_Box, list[_Replica]]]:
        """Boxes that share elements with a piece of the target, in row order."""
        boxes = self._boxes.get(piece.tensor, [])
        if not boxes:
            return
        first = bisect_left(self._rows[piece.tensor], piece.row - self._tallest[piece.tensor] + 1)
        for box, replicas in boxes[first:]:
            if box.row >= piece.row + piece.rows:
                return
            if box.row + box.rows > piece.row and box.col < piece.col + piece.cols and box.col + box.cols > piece.col:
                yield box, replicas


class _NearestReplica:
    """Chooses same device, then same host, then any; among equals the source that was asked for the fewest bytes."""

    def __init__(self, *, host: str, device: int, tp_rank: int, num_sources: int) -> None:
        self._host, self._device, self._tp_rank, self._num_sources = host, device, tp_rank, num_sources
        self.bytes_by_source: dict[int, int] = defaultdict(int)
        self.local_bytes = 0

    def choose(self, replicas: Sequence[_Replica], num_bytes: int) -> _Replica:
        chosen = min(replicas, key=self._cost)
        self.bytes_by_source[chosen.source.rank] += num_bytes
        self.local_bytes += num_bytes if self._distance(chosen.source) == 0 else 0
        return chosen

    def _cost(self, replica: _Replica) -> tuple[int, int, int]:
        rank = replica.source.rank
        # Engine ranks that plan apart from each other start at different sources.
        turn = (rank - self._tp_rank) % max(self._num_sources, 1)
        return self._distance(replica.source), self.bytes_by_source[rank], turn

    def _distance(self, source: SourceRank) -> int:
        if source.host != self._host:
            return 2
        return 0 if source.device == self._device else 1


def build_plan(
    spec: ModelSpec,
    sources: Sequence[SourceRank],
    targets: Sequence[TargetParam],
    *,
    tp_rank: int,
    tp_size: int,
    host: str,
    device: int,
    ep_size: int = 1,
) -> Plan:
    """The plan of engine rank `tp_rank` of `tp_size`, which runs on `device` (-1: CPU) of `host`.

    Args:
        sources: every trainer rank's export; replicas (data parallel, tied embeddings, norms) are chosen among.
        targets: the engine rank's live parameters, `targets_of(module.named_parameters())`.
        ep_size: the engine's expert-parallel size, a divisor of `tp_size`.

    Raises:
        ValueError: a name, shape or dtype does not fit, or some byte would be written never or twice.
    """
    _check_inputs(sources, targets)
    element_size = targets[0].element_size
    index = _SourceIndex(spec, sources, element_size)
    nearest = _NearestReplica(host=host, device=device, tp_rank=tp_rank, num_sources=len(sources))
    copies: list[CopyOp] = []
    fills: list[Fill] = []
    for target in targets:
        pieces = sglang_pieces(spec, target.name, target.shape, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size)
        param_copies = list(coalesce(_copies(target, pieces, index, nearest)))
        param_fills = _padding(target, pieces)
        check_target(target, param_copies, param_fills)
        copies += param_copies
        fills += param_fills
    return Plan(
        tp_rank=tp_rank,
        tp_size=tp_size,
        targets=tuple(targets),
        copies=tuple(copies),
        fills=tuple(fills),
        stats=_stats(copies, fills, nearest),
        digest=_digest(targets, copies, fills),
    )


def check_target(target: TargetParam, copies: Iterable[CopyOp], fills: Iterable[Fill]) -> None:
    """Return if the operations write every byte of `target` exactly once; ValueError otherwise."""
    boxes = [box for op in copies for box in boxes_of(target, op.dst_offset, op.dst_pitch, op.rows, op.row_bytes)]
    for fill in fills:
        boxes += boxes_of(target, fill.dst_offset, fill.num_bytes, 1, fill.num_bytes)
    check_exact_cover(target, boxes)


def _copies(
    target: TargetParam, pieces: Sequence[Piece], index: _SourceIndex, nearest: _NearestReplica
) -> Iterator[CopyOp]:
    size, dst_pitch = target.element_size, target.row_bytes
    for piece in pieces:
        for box, replicas in index.overlapping(piece):
            row, col = max(box.row, piece.row), max(box.col, piece.col)
            rows = min(box.row + box.rows, piece.row + piece.rows) - row
            row_bytes = (min(box.col + box.cols, piece.col + piece.cols) - col) * size
            replica = nearest.choose(replicas, rows * row_bytes)
            yield CopyOp(
                src_rank=replica.source.rank,
                src_buffer=replica.buffer,
                src_offset=replica.offset + (row - box.row) * replica.pitch + (col - box.col) * size,
                src_pitch=replica.pitch,
                dst_param=target.name,
                dst_offset=(piece.local_row + row - piece.row) * dst_pitch + (piece.local_col + col - piece.col) * size,
                dst_pitch=dst_pitch,
                rows=rows,
                row_bytes=row_bytes,
            )


def _padding(target: TargetParam, pieces: Sequence[Piece]) -> list[Fill]:
    """Vocabulary rows below the last piece are zero, as SGLang's own loader leaves them."""
    if target.name not in VOCABULARY_PARAMS:
        return []
    used = max((piece.local_row + piece.rows for piece in pieces), default=0)
    tail = (target.rows - used) * target.row_bytes
    return [Fill(target.name, used * target.row_bytes, tail)] if tail else []


def _check_inputs(sources: Sequence[SourceRank], targets: Sequence[TargetParam]) -> None:
    if not sources or not targets:
        raise ValueError(f"a plan needs both sides; got {len(sources)} source ranks and {len(targets)} parameters")
    for what, count in (
        ("source rank", Counter(str(source.rank) for source in sources)),
        ("parameter", Counter(target.name for target in targets)),
    ):
        repeated = [name for name, times in count.items() if times > 1]
        if repeated:
            raise ValueError(f"{what} {', '.join(repeated)} is listed more than once")
    for target in targets:
        for source in sources:
            if target.dtype != source.dtype:
                raise ValueError(
                    f"parameter {target.name} is {target.dtype}, but trainer rank {source.rank} exports {source.dtype}"
                    "; set the same dtype for the trainer and the engine"
                )


def _check_in_buffer(source: SourceRank, param: SourceParam, num_bytes: int) -> None:
    if not 0 <= param.buffer < len(source.buffers):
        raise ValueError(
            f"trainer rank {source.rank} lists {param.name} in buffer {param.buffer}, but exports "
            f"{len(source.buffers)} buffers"
        )
    room = source.buffers[param.buffer].num_bytes
    if param.offset_bytes < 0 or param.offset_bytes + num_bytes > room:
        raise ValueError(
            f"trainer rank {source.rank}: {param.name} at byte {param.offset_bytes} with {num_bytes} bytes leaves "
            f"buffer {param.buffer} of {room} bytes"
        )


def _stats(copies: Sequence[CopyOp], fills: Sequence[Fill], nearest: _NearestReplica) -> PlanStats:
    return PlanStats(
        copies=len(copies),
        fills=len(fills),
        bytes=sum(op.num_bytes for op in copies),
        fill_bytes=sum(fill.num_bytes for fill in fills),
        local_bytes=nearest.local_bytes,
        bytes_by_source={rank: count for rank, count in sorted(nearest.bytes_by_source.items()) if count},
    )


def _digest(targets: Sequence[TargetParam], copies: Sequence[CopyOp], fills: Sequence[Fill]) -> str:
    digest = hashlib.sha256()
    for item in (*targets, *copies, *fills):
        digest.update(repr(item).encode())
    return digest.hexdigest()
