"""What a reshard moves in a job of any size, from the real plans of its engine ranks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mrl.reshard.plan import PlanStats, build_plan
from mrl.reshard.routes import EnginePlaces
from mrl.scale.exports import ShardKey, engine_params, host_name, shard_key, trainer_exports
from mrl.scale.job import Job
from mrl.scale.placement import place_engines


@dataclass(kw_only=True, frozen=True)
class RankGroup:
    """Engine ranks of one place in their engines, beside the same shards: their plans move as many bytes."""

    ranks: tuple[int, ...]
    stats: PlanStats
    """Of the first of them."""


@dataclass(kw_only=True, frozen=True)
class Traffic:
    """The plans of a job's engine ranks, or of a sample of their groups."""

    groups: tuple[RankGroup, ...]
    num_groups: int
    """Those that were not planned counted, too."""
    num_ranks: int

    def mean(self, name: str) -> float:
        """A size of `PlanStats`, per engine rank."""
        planned = sum(len(group.ranks) for group in self.groups)
        return sum(len(group.ranks) * int(getattr(group.stats, name)) for group in self.groups) / planned

    def largest(self, name: str) -> int:
        """The same on the rank with most of it."""
        return max(int(getattr(group.stats, name)) for group in self.groups)


def plan_traffic(job: Job, *, most_groups: int | None = None) -> Traffic:
    """Plan the reshard of one engine rank of every group.

    Args:
        most_groups: plan no more groups than this, drawn at random with a fixed seed; None plans all.

    Raises:
        ValueError: layouts that do not divide the model, or shards that lie on no host with an engine.
    """
    sources = trainer_exports(job.spec, job.layout, dtype=job.dtype, gpus_per_host=job.gpus_per_host)
    targets = engine_params(job.spec, tp=job.rollout_tp, ep=job.rollout_ep, dtype=job.dtype)
    num_ranks = job.num_engines * job.rollout_tp
    hosts = tuple(host_name(rank, job.gpus_per_host) for rank in range(num_ranks))
    beside = place_engines(job)
    devices = tuple(rank % job.gpus_per_host for rank in beside)
    found = _groups(job, beside)
    chosen: Sequence[int] = range(len(found))
    if most_groups is not None and most_groups < len(found):
        chosen = sorted(random.Random(0).sample(chosen, most_groups))
    groups = []
    for ranks in (found[number] for number in chosen):
        first = ranks[0]
        plan = build_plan(
            job.spec,
            sources,
            targets,
            tp_rank=first % job.rollout_tp,
            tp_size=job.rollout_tp,
            ep_size=job.rollout_ep,
            host=hosts[first],
            device=devices[first],
            places=EnginePlaces(hosts=hosts, devices=devices, tp_size=job.rollout_tp, rank=first),
            alias=job.alias,
        )
        groups.append(RankGroup(ranks=ranks, stats=plan.stats))
    return Traffic(groups=tuple(groups), num_groups=len(found), num_ranks=num_ranks)


def _groups(job: Job, beside: Sequence[int]) -> list[tuple[int, ...]]:
    """Engine ranks by their place in the engine, the shard on their own GPU, and the shards on their host."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    on_host: dict[int, tuple[ShardKey, ...]] = {}
    for rank, trainer_rank in enumerate(beside):
        host = rank // job.gpus_per_host
        if host not in on_host:
            last = min((host + 1) * job.gpus_per_host, job.layout.world_size)
            ranks = range(host * job.gpus_per_host, last)
            on_host[host] = tuple(sorted(shard_key(job.layout, each) for each in ranks))
        groups[rank % job.rollout_tp, shard_key(job.layout, trainer_rank), on_host[host]].append(rank)
    return [tuple(ranks) for ranks in groups.values()]
