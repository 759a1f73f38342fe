"""What an engine rank takes from its own host, and which of it the copy engines bring from other devices. Pure Python.

Copy engines move bytes between devices faster than kernels do, but they sum nothing. So each such copy has a witness:
the engine rank on the device it is read from, which sums what the reader ought to get while the reader sums what it
got. The reader's choices follow from the exports and the engine ranks' places alone; the witness repeats them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mrl.reshard.aliases import Alias, find_alias
from mrl.reshard.layout import SourceRank, TargetParam
from mrl.reshard.operations import CopyOp, coalesce
from mrl.reshard.overlaps import EngineModel, Overlap, overlaps
from mrl.reshard.routes import EnginePlaces, LocalChoice
from mrl.reshard.sources import SourceIndex
from mrl.reshard.transfers import Transfer

COPY_ENGINE_BYTES = 8 << 20
"""Fewest bytes of a copy that is theirs: each costs about 9 us beside its bytes, whether its rows lie apart or not. A
kernel reads smaller ones meanwhile."""


@dataclass(kw_only=True, frozen=True)
class Nearby:
    """Where one parameter's bytes come from."""

    alias: Alias | None
    """All of it is memory of the own device, which it can be itself; there is nothing else then."""
    copies: Sequence[CopyOp]
    """From the own host."""
    elsewhere: Sequence[Overlap]
    """What no source of the own host has."""


def take_nearby(
    target: TargetParam, model: EngineModel, index: SourceIndex, near: LocalChoice, tp_rank: int, *, alias: bool
) -> Nearby:
    """Choose for the next parameter of the engine rank that `near` chooses for; parameters come in the model's order.

    Args:
        alias: have the parameter be the trainer's memory where that can be.
    """
    found = list(overlaps(target, model.pieces(target, tp_rank), index))
    shared = find_alias(target, found, near) if alias else None
    if shared is not None:
        return Nearby(alias=shared, copies=(), elsewhere=())
    copies: list[CopyOp] = []
    elsewhere: list[Overlap] = []
    for overlap in found:
        here = near.choose(overlap.holding, overlap.num_bytes)
        if here is None:
            elsewhere.append(overlap)
        else:
            copies.append(overlap.copy_from(here[0], here[1].rank))
    return Nearby(alias=None, copies=list(coalesce(copies)), elsewhere=elsewhere)


class PeerChoice:
    """Which copies of an engine rank the copy engines do. The same seen from that rank and from any other.

    A device without an engine rank has no witness, and where the engine ranks' devices are not known none has: the
    kernel copies from there and sums what it reads.

    Args:
        least_bytes: of a copy of theirs; None if they copy nothing.
    """

    def __init__(self, places: EnginePlaces, sources: Sequence[SourceRank], least_bytes: int | None) -> None:
        self._least = least_bytes or 0
        witnesses: dict[int, int] = {}
        for rank in places.on_host() if least_bytes is not None else ():
            device = places.device_of(rank)
            if device is not None and device != places.device:
                witnesses.setdefault(device, rank)
        self._witness_of = {
            source.rank: witnesses[source.device]
            for source in sources
            if source.host == places.host and source.device in witnesses
        }

    @property
    def witnesses(self) -> set[int]:
        """Engine ranks that may be a witness of copies of this one."""
        return set(self._witness_of.values())

    def witness(self, op: CopyOp) -> int | None:
        """The engine rank on the device that the copy reads; None for a copy that the kernel does."""
        if op.num_bytes < self._least:
            return None
        return self._witness_of.get(op.src_rank)


def by_peer(copies: Mapping[int, Sequence[CopyOp]]) -> tuple[Transfer, ...]:
    """The same as transfers, by peer."""
    return tuple(Transfer(peer=peer, copies=tuple(each)) for peer, each in sorted(copies.items()))


def plan_serves(
    model: EngineModel,
    index: SourceIndex,
    sources: Sequence[SourceRank],
    places: EnginePlaces,
    least_bytes: int | None,
    *,
    alias: bool,
) -> tuple[Transfer, ...]:
    """What the copy engines of other engine ranks read from this one's device, in those ranks' order."""
    served: dict[int, list[CopyOp]] = defaultdict(list)
    for reader in places.on_host():
        theirs = places.of(reader)
        choice = PeerChoice(theirs, sources, least_bytes)
        if theirs.device is None or places.rank not in choice.witnesses:
            continue
        near = LocalChoice(theirs, theirs.device, len(sources))
        for target in model.targets:
            taken = take_nearby(target, model, index, near, theirs.tp_rank, alias=alias)
            served[reader] += [op for op in taken.copies if choice.witness(op) == places.rank]
    return by_peer({reader: copies for reader, copies in served.items() if copies})
