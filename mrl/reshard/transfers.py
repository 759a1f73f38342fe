"""What one engine rank sends another across hosts, planned by both of them apart from each other. Pure Python."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mrl.reshard.operations import CopyOp, coalesce
from mrl.reshard.overlaps import EngineModel, overlaps
from mrl.reshard.routes import EnginePlaces, RemoteChoice
from mrl.reshard.sources import Holding, SourceIndex


@dataclass(kw_only=True, frozen=True)
class Transfer:
    """The bytes that go from one engine rank to another."""

    peer: int
    """The other engine rank, numbered over all engines."""
    copies: tuple[CopyOp, ...]
    """From buffers of the sender's host into the receiver's parameters, in the order of the bytes on the wire."""

    @property
    def num_bytes(self) -> int:
        return sum(op.num_bytes for op in self.copies)


class TransferList:
    """Transfers that grow parameter by parameter; copies of one parameter and peer are merged where they can be."""

    def __init__(self) -> None:
        self._done: dict[int, list[CopyOp]] = defaultdict(list)

    def extend(self, by_peer: Mapping[int, Sequence[CopyOp]]) -> None:
        """Add the copies of one parameter, by peer; both sides call this once for each parameter."""
        for peer, copies in by_peer.items():
            self._done[peer] += coalesce(copies)

    def transfers(self) -> tuple[Transfer, ...]:
        """All of them, by peer."""
        return tuple(Transfer(peer=peer, copies=tuple(copies)) for peer, copies in sorted(self._done.items()))


def plan_sends(
    model: EngineModel, index: SourceIndex, choice: RemoteChoice, places: EnginePlaces
) -> tuple[Transfer, ...]:
    """What this engine rank sends, of the boxes on its host to the engine ranks that lack them on theirs.

    Repeats those ranks' choices, but only where this rank may be chosen.
    """
    served = _Served(choice, places)
    sends = TransferList()
    here = SourceIndex(holding for holding in index.holdings if served.any(holding))
    for tp_rank in range(model.tp_size):
        for target in model.targets:
            by_peer: dict[int, list[CopyOp]] = defaultdict(list)
            for overlap in overlaps(target, model.pieces(target, tp_rank), here):
                for receiver in served.receivers(overlap.holding, tp_rank):
                    chosen = choice.choose(overlap.holding, receiver, overlap.num_bytes)
                    if chosen.sender == places.rank:
                        replica = overlap.holding.replicas[chosen.replica]
                        by_peer[receiver].append(overlap.copy_from(replica, chosen.source.rank))
            sends.extend(by_peer)
    return sends.transfers()


class _Served:
    """For every box, the engine ranks that may take it from this one."""

    def __init__(self, choice: RemoteChoice, places: EnginePlaces) -> None:
        self._choice, self._places = choice, places
        self._receivers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def any(self, holding: Holding) -> bool:
        return any(self.receivers(holding, tp_rank) for tp_rank in range(self._places.tp_size))

    def receivers(self, holding: Holding, tp_rank: int) -> list[int]:
        key = holding.shards, tp_rank
        if key not in self._receivers:
            own = self._choice.can_send(holding, self._places.rank)
            lacking = self._choice.lacking(holding, tp_rank) if own else ()
            self._receivers[key] = [receiver for receiver in lacking if self._is_candidate(holding, receiver)]
        return self._receivers[key]

    def _is_candidate(self, holding: Holding, receiver: int) -> bool:
        return any(each.sender == self._places.rank for each in self._choice.candidates(holding, receiver))
