"""What copy engines moved between devices, as seen from both ends, and whether the ends agree. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrl.reshard.errors import ReshardError

Sums = Mapping[int, int | None]
"""Checksums modulo 2^64, by the engine rank at the other end; None where the reader has compared both sides itself."""


@dataclass(kw_only=True, frozen=True)
class PeerSums:
    """Checksums that one engine rank took in one pull."""

    rank: int
    """Its number over all engines of the job."""
    arrived: Sums
    """Of what lies in its parameters, by the engine rank on the device from which it came."""
    served: Sums
    """Of what lies on its device, by the engine rank that read it."""

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "arrived": list(self.arrived.items()), "served": list(self.served.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PeerSums:
        return cls(rank=data["rank"], arrived=dict(data["arrived"]), served=dict(data["served"]))


@dataclass(kw_only=True, frozen=True)
class Pulled:
    """What one run of a plan's copies within the host did."""

    checksum: int
    """Of all that arrived, modulo 2^64."""
    seconds: float
    """Until all was there and summed."""
    verify_seconds: float
    """Of these, those after the last byte was there."""
    sums: PeerSums


def check_peer_sums(sums: Sequence[PeerSums], *, whole_job: bool) -> None:
    """Return if every reader has what lies on the devices that it read.

    Args:
        sums: of one pull, of each engine rank.
        whole_job: they are all ranks of the job; otherwise pairs of which one end is absent are left out.

    Raises:
        ReshardError: sums differ, or only one end of a pair has taken one; names reader, owner, both sums.
    """
    by_rank = {each.rank: each for each in sums}
    for reader, owner in sorted(set(_pairs(sums))):
        if not whole_job and not {reader, owner} <= by_rank.keys():
            continue
        arrived, served = _sum_of(by_rank, reader, owner), _sum_of(by_rank, owner, reader, served=True)
        if not _agree(arrived, served):
            raise ReshardError(
                f"engine rank {reader} read weights from the device of engine rank {owner}: the checksum of what "
                f"arrived is {_text(arrived)}, that of what lies there {_text(served)}; the trainer changed its "
                "weights during the pull, the engine ranks planned differently, or memory was corrupted. Pull again"
            )


_ABSENT = "absent"


def _pairs(sums: Iterable[PeerSums]) -> Iterator[tuple[int, int]]:
    """(reader, owner)"""
    for each in sums:
        yield from ((each.rank, owner) for owner in each.arrived)
        yield from ((reader, each.rank) for reader in each.served)


def _sum_of(by_rank: Mapping[int, PeerSums], rank: int, peer: int, *, served: bool = False) -> int | str | None:
    if rank not in by_rank:
        return _ABSENT
    sums = by_rank[rank].served if served else by_rank[rank].arrived
    return sums.get(peer, _ABSENT)


def _agree(arrived: int | str | None, served: int | str | None) -> bool:
    if _ABSENT in (arrived, served):
        return False
    return arrived is None or arrived == served


def _text(value: int | str | None) -> str:
    if isinstance(value, int):
        return f"{value:#x}"
    return "not taken" if value is None else value
