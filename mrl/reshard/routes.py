"""Which copy of a box an engine rank reads, and across hosts, which engine rank sends it. Pure Python.

The nearest copy wins: same device, same host, other host. Choices across hosts follow from the exports and the engine
ranks' hosts alone, so that sender and receiver make the same ones apart from each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mrl.reshard.layout import SourceRank
from mrl.reshard.sources import Holding, Replica


@dataclass(kw_only=True, frozen=True)
class EnginePlaces:
    """Where all engine ranks of the job run, and which of them this one is."""

    hosts: tuple[str, ...]
    """Of every engine rank, engine by engine; under the names that `SourceRank.host` uses."""
    tp_size: int
    """Ranks per engine."""
    rank: int
    """This rank's index into `hosts`."""
    devices: tuple[int, ...] | None = None
    """Of every engine rank, under the numbers that `SourceRank.device` uses; None if they are not known."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < len(self.hosts) or len(self.hosts) % self.tp_size:
            raise ValueError(f"engine rank {self.rank} of {len(self.hosts)} in engines of {self.tp_size} ranks")
        if self.devices is not None and len(self.devices) != len(self.hosts):
            raise ValueError(f"{len(self.devices)} devices of {len(self.hosts)} engine ranks")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def host(self) -> str:
        """This rank's host."""
        return self.hosts[self.rank]

    @property
    def device(self) -> int | None:
        """This rank's device."""
        return self.device_of(self.rank)

    def device_of(self, rank: int) -> int | None:
        """That engine rank's device; None if it is not known."""
        return None if self.devices is None else self.devices[rank]

    def of(self, rank: int) -> EnginePlaces:
        """The same, seen from another engine rank."""
        return replace(self, rank=rank)

    def on_host(self) -> list[int]:
        """The engine ranks of this rank's host, itself among them."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.host]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trainer rank's copy of a box, and the engine rank that would send it."""

    replica: int
    """Index into `Holding.replicas`."""
    source: SourceRank
    sender: int


class LocalChoice:
    """Copies on the own host: the same device first; among equals the source that was asked for the fewest bytes."""

    def __init__(self, places: EnginePlaces, device: int, num_sources: int) -> None:
        self._host, self._device = places.host, device
        self._tp_rank, self._num_sources = places.tp_rank, num_sources
        self._near: dict[tuple[int, ...], list[tuple[int, SourceRank]]] = {}
        self.bytes_by_source: dict[int, int] = defaultdict(int)
        self.device_bytes = 0
        """Of all chosen, those on the own device."""

    def choose(self, holding: Holding, num_bytes: int) -> tuple[Replica, SourceRank] | None:
        """The copy to read; None if no source on this host has the box."""
        near = self._nearest(holding)
        if not near:
            return None
        replica, source = near[0] if len(near) == 1 else min(near, key=self._load)
        self.bytes_by_source[source.rank] += num_bytes
        self.device_bytes += num_bytes if source.device == self._device else 0
        return holding.replicas[replica], source

    def on_device(self, holding: Holding) -> list[tuple[Replica, SourceRank]]:
        """Every copy on the own device."""
        near = self._nearest(holding)
        return [(holding.replicas[index], source) for index, source in near if source.device == self._device]

    def _nearest(self, holding: Holding) -> list[tuple[int, SourceRank]]:
        key = holding.shards
        if key not in self._near:
            here = [(index, source) for index, source in _copies(holding) if source.host == self._host]
            own = [(index, source) for index, source in here if source.device == self._device]
            self._near[key] = own or here
        return self._near[key]

    def _load(self, item: tuple[int, SourceRank]) -> tuple[int, int]:
        rank = item[1].rank
        # Engine ranks that plan apart from each other start at different sources.
        return self.bytes_by_source[rank], (rank - self._tp_rank) % self._num_sources


class RemoteChoice:
    """Copies on other hosts, dealt out so that neither a copy nor a sender serves more than its share.

    Engine ranks of one place in their engines that lack a box form a queue. It is dealt out over the hosts that have
    the box and there over the copies; a queue shorter than the copies leaves several to a rank, which then takes from
    the one it took the fewest bytes from. All this depends on the box's shards only, never on other boxes.
    """

    def __init__(self, places: EnginePlaces, sources: Sequence[SourceRank]) -> None:
        self._places = places
        self._senders: dict[str, list[int]] = defaultdict(list)
        for rank, host in enumerate(places.hosts):
            self._senders[host].append(rank)
        self._sender_of: dict[int, int] = {}
        met: dict[str, int] = defaultdict(int)
        on_gpu = _ranks_by_gpu(places)
        for source in sorted(sources, key=lambda source: source.rank):
            senders = self._senders.get(source.host)
            if senders:
                # One to one where every trainer rank has an engine rank beside it: that reads its own device.
                in_turn = senders[met[source.host] % len(senders)]
                self._sender_of[source.rank] = on_gpu.get((source.host, source.device), in_turn)
                met[source.host] += 1
        self._senders_of: dict[tuple[int, ...], set[int | None]] = {}
        self._queues: dict[tuple[tuple[int, ...], int], dict[int, int]] = {}
        self._copies: dict[tuple[int, ...], list[list[Candidate]]] = {}
        self._candidates: dict[tuple[tuple[int, ...], int], list[Candidate]] = {}
        self._taken: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def lacking(self, holding: Holding, tp_rank: int) -> dict[int, int]:
        """Engine ranks of that place without the box on their host, each with its number in the queue."""
        key = holding.shards, tp_rank
        if key not in self._queues:
            hosts = {source.host for _, source in _copies(holding)}
            ranks = range(tp_rank, len(self._places.hosts), self._places.tp_size)
            lacking = [rank for rank in ranks if self._places.hosts[rank] not in hosts]
            self._queues[key] = {rank: number for number, rank in enumerate(lacking)}
        return self._queues[key]

    def can_send(self, holding: Holding, rank: int) -> bool:
        """Whether an engine rank is the sender of any copy of the box."""
        key = holding.shards
        if key not in self._senders_of:
            ranks = {self._sender_of.get(source.rank) for _, source in _copies(holding)}
            self._senders_of[key] = ranks
        return rank in self._senders_of[key]

    def candidates(self, holding: Holding, receiver: int) -> list[Candidate]:
        """Copies that the receiver, an engine rank without the box on its host, takes its bytes from.

        Raises:
            ValueError: no host with the box has an engine rank.
        """
        key = holding.shards, receiver
        if key not in self._candidates:
            tp_rank = receiver % self._places.tp_size
            queue = self.lacking(holding, tp_rank)
            self._candidates[key] = self._deal(self._by_host(holding), len(queue), queue[receiver], tp_rank)
        return self._candidates[key]

    def choose(self, holding: Holding, receiver: int, num_bytes: int) -> Candidate:
        """The copy for the receiver's next bytes. Sender and receiver have to ask for the same boxes in one order."""
        candidates = self.candidates(holding, receiver)
        if len(candidates) == 1:
            return candidates[0]
        taken = self._taken.setdefault((holding.shards, receiver), [0] * len(candidates))
        index = min(range(len(candidates)), key=taken.__getitem__)
        taken[index] += num_bytes
        return candidates[index]

    def _deal(self, by_host: list[list[Candidate]], length: int, number: int, tp_rank: int) -> list[Candidate]:
        turn, host = divmod(number, len(by_host))
        mine = [by_host[host]] if length >= len(by_host) else by_host[number::length]
        # At most this many share a host's copies; the places count too, as each asks for boxes of its own.
        turns, places = -(-length // len(by_host)), self._places.tp_size
        chosen: list[Candidate] = []
        for copies in mine:
            if turns * places >= len(copies):
                chosen.append(copies[(turn + tp_rank) % len(copies)])
            else:
                chosen += copies[turn * places + tp_rank :: turns * places]
        return chosen

    def _by_host(self, holding: Holding) -> list[list[Candidate]]:
        key = holding.shards
        if key not in self._copies:
            by_host: dict[str, list[Candidate]] = defaultdict(list)
            for replica, source in _copies(holding):
                if source.rank in self._sender_of:
                    by_host[source.host].append(Candidate(replica, source, self._sender_of[source.rank]))
            self._copies[key] = list(by_host.values())
        if not self._copies[key]:
            self._refuse(holding)
        return self._copies[key]

    def _refuse(self, holding: Holding) -> None:
        hosts = sorted({source.host for _, source in _copies(holding)})
        raise ValueError(
            f"{holding.tensor} lies on {', '.join(hosts)} only, where no rollout engine runs that could send it to the "
            f"engines on {', '.join(sorted(self._senders))}; raise rollout.num_engines or lower "
            "tensor_model_parallel_size of the rollout so that engines cover every host, or choose a smaller "
            "pipeline_model_parallel_size, so that the hosts with engines hold the whole model"
        )


def _ranks_by_gpu(places: EnginePlaces) -> dict[tuple[str, int], int]:
    """The first engine rank on each GPU; empty where they run on CPUs or their devices are not known."""
    ranks: dict[tuple[str, int], int] = {}
    for rank, host in enumerate(places.hosts):
        device = places.device_of(rank)
        if device is not None and device >= 0:
            ranks.setdefault((host, device), rank)
    return ranks


def crosses_hosts(holdings: Sequence[Holding], places: EnginePlaces) -> bool:
    """Whether some host with engine ranks lacks some box; the same on every engine rank."""
    engines = set(places.hosts)
    seen: set[tuple[int, ...]] = set()
    for holding in holdings:
        if holding.shards not in seen:
            seen.add(holding.shards)
            if engines - {source.host for _, source in _copies(holding)}:
                return True
    return False


def _copies(holding: Holding) -> list[tuple[int, SourceRank]]:
    """Every rank's copy, as (index of the replica, rank), by rank."""
    copies = [(index, source) for index, replica in enumerate(holding.replicas) for source in replica.shard.ranks]
    return sorted(copies, key=lambda item: item[1].rank)
