"""Which bytes an engine rank takes from which trainer buffers. Pure Python: no torch, process group or engine.

Both sides are described as boxes of Hugging Face tensors; the plan is their intersection, checked to write every byte
of every parameter exactly once. Bytes of other hosts are sent by an engine rank there. A rank plans what it copies,
receives and sends, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from mrl.reshard.aliases import Alias
from mrl.reshard.coverage import boxes_of, check_exact_cover
from mrl.reshard.families import VOCABULARY_PARAMS
from mrl.reshard.layout import Piece, SourceRank, TargetParam
from mrl.reshard.operations import CopyOp, Fill
from mrl.reshard.overlaps import EngineModel
from mrl.reshard.peers import PeerChoice, by_peer, plan_serves, take_nearby
from mrl.reshard.routes import EnginePlaces, LocalChoice, RemoteChoice, crosses_hosts
from mrl.reshard.sources import SourceIndex
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transfers import Transfer, TransferList, plan_sends


@dataclass(kw_only=True, frozen=True)
class PlanStats:
    """Sizes of a plan, for logs and rooflines."""

    copies: int
    """Within the host and received."""
    fills: int
    bytes: int
    """Copied and received; fills and aliases not counted."""
    fill_bytes: int
    local_bytes: int
    """Copied from memory of the target's own device and host."""
    remote_bytes: int
    """Received from engine ranks on other hosts."""
    sent_bytes: int
    """Sent to engine ranks on other hosts."""
    bytes_by_source: dict[int, int]
    """By the trainer rank whose memory they come from."""
    aliased_bytes: int = 0
    """Of parameters that are the trainer's memory: never moved."""
    copy_engine_bytes: int = 0
    """Of those from other devices of the host, what the copy engines bring."""

    @property
    def same_host_bytes(self) -> int:
        """Copied from other devices of the target's host."""
        return self.bytes - self.local_bytes - self.remote_bytes


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Everything one engine rank does in one reshard."""

    rank: int
    """This engine rank, numbered over all engines of the job."""
    tp_rank: int
    tp_size: int
    targets: tuple[TargetParam, ...]
    copies: tuple[CopyOp, ...]
    """From buffers of this host, by the kernel."""
    reads: tuple[Transfer, ...]
    """From buffers on other devices of this host, by the copy engines; a peer is the engine rank on that device."""
    serves: tuple[Transfer, ...]
    """What the copy engines of other engine ranks of this host read from this one's device: their `reads` of it."""
    fills: tuple[Fill, ...]
    aliases: tuple[Alias, ...]
    """Parameters that have no memory of their own: they are the trainer's."""
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    crosses_hosts: bool
    """Whether any engine rank of the job may need bytes of another host; the same on all of them."""
    stats: PlanStats
    digest: str
    """SHA-256 of the operations: equal inputs give equal plans, in any process."""

    @property
    def host_copies(self) -> Iterator[CopyOp]:
        """All from buffers of this host, by the kernel or the copy engines."""
        return chain(self.copies, *(transfer.copies for transfer in self.reads))


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
    places: EnginePlaces | None = None,
    alias: bool = False,
    copy_engine_bytes: int | None = None,
) -> Plan:
    """The plan of engine rank `tp_rank` of `tp_size`, which runs on `device` (-1: CPU) of `host`.

    Args:
        sources: every trainer rank's export; replicas (data parallel, tied embeddings, norms) are chosen among.
        targets: the engine rank's live parameters, `targets_of(module.named_parameters())`. The job's other engine
            ranks hold the same model, so theirs have the same names and shapes.
        ep_size: the engine's expert-parallel size, a divisor of `tp_size`.
        places: all engine ranks of the job; None for one engine, all of it on `host`.
        alias: have parameters be the trainer's memory where that holds the same bytes in the same order; as on the
            job's other engine ranks.
        copy_engine_bytes: fewest bytes of a copy from another device that is the copy engines', where the places tell
            the devices; None if none is. As on the job's other engine ranks.

    Raises:
        ValueError: a name, shape or dtype does not fit, some byte would be written never or twice, it lies only on
            hosts without an engine rank, or the other engine ranks take this one to be on another device.
    """
    _check_inputs(sources, targets)
    places = places or EnginePlaces(hosts=(host,) * tp_size, tp_size=tp_size, rank=tp_rank)
    assert (places.tp_rank, places.tp_size, places.host) == (tp_rank, tp_size, host), places
    if copy_engine_bytes is not None:
        _check_device(places, device)
    model = EngineModel(spec=spec, targets=targets, tp_size=tp_size, ep_size=ep_size)
    index = SourceIndex.build(spec, sources, targets[0].element_size)
    near, far = LocalChoice(places, device, len(sources)), RemoteChoice(places, sources)
    peers = PeerChoice(places, sources, copy_engine_bytes)
    pulls = _Pulls(model, index, near, far, peers, places, alias=alias)
    receives = pulls.remote.transfers()
    crossing = crosses_hosts(index.holdings, places)
    sends = plan_sends(model, index, RemoteChoice(places, sources), places) if crossing else ()
    reads, serves = by_peer(pulls.reads), plan_serves(model, index, sources, places, copy_engine_bytes, alias=alias)
    return Plan(
        rank=places.rank,
        tp_rank=tp_rank,
        tp_size=tp_size,
        targets=tuple(targets),
        copies=tuple(pulls.copies),
        reads=reads,
        serves=serves,
        fills=tuple(pulls.fills),
        aliases=tuple(pulls.aliases),
        receives=receives,
        sends=sends,
        crosses_hosts=crossing,
        stats=_stats(pulls, receives, sends),
        digest=_digest(targets, pulls.copies, pulls.fills, receives, sends, pulls.aliases, reads, serves),
    )


class _Pulls:
    """What the rank's own parameters are made of: aliases, copies within the host, fills, copies from other hosts."""

    def __init__(
        self,
        model: EngineModel,
        index: SourceIndex,
        near: LocalChoice,
        far: RemoteChoice,
        peers: PeerChoice,
        places: EnginePlaces,
        *,
        alias: bool,
    ) -> None:
        self._model, self._index, self._places, self._alias = model, index, places, alias
        self._far, self._peers = far, peers
        self.near = near
        self.copies: list[CopyOp] = []
        self.reads: dict[int, list[CopyOp]] = defaultdict(list)
        self.fills: list[Fill] = []
        self.aliases: list[Alias] = []
        self.remote = TransferList()
        for target in model.targets:
            self._add(target)

    def _add(self, target: TargetParam) -> None:
        tp_rank = self._places.tp_rank
        nearby = take_nearby(target, self._model, self._index, self.near, tp_rank, alias=self._alias)
        if nearby.alias is not None:
            check_target(target, [], [], [nearby.alias])
            self.aliases.append(nearby.alias)
            return
        received: dict[int, list[CopyOp]] = defaultdict(list)
        for overlap in nearby.elsewhere:
            chosen = self._far.choose(overlap.holding, self._places.rank, overlap.num_bytes)
            replica = overlap.holding.replicas[chosen.replica]
            received[chosen.sender].append(overlap.copy_from(replica, chosen.source.rank))
        fills = _padding(target, self._model.pieces(target, tp_rank))
        check_target(target, chain(nearby.copies, *received.values()), fills)
        for op in nearby.copies:
            witness = self._peers.witness(op)
            (self.copies if witness is None else self.reads[witness]).append(op)
        self.fills += fills
        self.remote.extend(received)


def check_target(
    target: TargetParam, copies: Iterable[CopyOp], fills: Iterable[Fill], aliases: Iterable[Alias] = ()
) -> None:
    """Return if the operations provide every byte of `target` exactly once; ValueError otherwise."""
    boxes = [box for op in copies for box in boxes_of(target, op.dst_offset, op.dst_pitch, op.rows, op.row_bytes)]
    for fill in fills:
        boxes += boxes_of(target, fill.dst_offset, fill.num_bytes, 1, fill.num_bytes)
    for alias in aliases:
        boxes += boxes_of(target, 0, alias.num_bytes, 1, alias.num_bytes)
    check_exact_cover(target, boxes)


def _padding(target: TargetParam, pieces: Sequence[Piece]) -> list[Fill]:
    """Vocabulary rows below the last piece are zero, as SGLang's own loader leaves them."""
    if target.name not in VOCABULARY_PARAMS:
        return []
    used = max((piece.local_row + piece.rows for piece in pieces), default=0)
    tail = (target.rows - used) * target.row_bytes
    return [Fill(target.name, used * target.row_bytes, tail)] if tail else []


def _check_device(places: EnginePlaces, device: int) -> None:
    if places.device not in (None, device):
        raise ValueError(
            f"engine rank {places.rank} runs on device {device:#x} of {places.host}, but the others take it to be on "
            f"device {places.device:#x}, the one of the trainer rank beside it; give each trainer rank a GPU of its own"
        )


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


def _stats(pulls: _Pulls, receives: Sequence[Transfer], sends: Sequence[Transfer]) -> PlanStats:
    received = [op for transfer in receives for op in transfer.copies]
    by_source = Counter(pulls.near.bytes_by_source)
    for op in received:
        by_source[op.src_rank] += op.num_bytes
    read = [op for copies in pulls.reads.values() for op in copies]
    remote = sum(op.num_bytes for op in received)
    return PlanStats(
        copies=len(pulls.copies) + len(read) + len(received),
        fills=len(pulls.fills),
        bytes=sum(op.num_bytes for op in chain(pulls.copies, read)) + remote,
        fill_bytes=sum(fill.num_bytes for fill in pulls.fills),
        local_bytes=pulls.near.device_bytes,
        remote_bytes=remote,
        sent_bytes=sum(transfer.num_bytes for transfer in sends),
        bytes_by_source=dict(sorted(by_source.items())),
        aliased_bytes=sum(alias.num_bytes for alias in pulls.aliases),
        copy_engine_bytes=sum(op.num_bytes for op in read),
    )


def _digest(*parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for item in chain(*parts):
        digest.update(repr(item).encode())
    return digest.hexdigest()
