"""Which GPU each rank of an engine runs on: the one that holds most of what it needs.

An engine of T ranks lives on T consecutive trainer ranks' GPUs, in any order within a host. Training at TP2 x DP2, the
GPUs hold the first half of the model, the second, the first, the second; the ranks of a TP4 engine need the first
quarter, the second, the third, the fourth. In the order of their numbers two of them find nothing on their own GPU; as
0, 2, 1, 3 all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from mrl.reshard.layout import SourceRank
from mrl.reshard.overlaps import EngineModel, overlaps
from mrl.reshard.sources import SourceIndex
from mrl.scale.exports import ShardKey, engine_params, shard_key, trainer_exports
from mrl.scale.job import Job


def place_engines(job: Job) -> tuple[int, ...]:
    """For every engine rank of the job, the trainer rank whose GPU it runs on.

    Each engine keeps its block of ranks on every host; within it as many bytes as possible are local, and where the
    order of the numbers is as good as any it stays.
    """
    needs = _Needs(job)
    beside: list[int] = []
    blocks = groupby(range(job.num_engines * job.rollout_tp), lambda rank: _block(job, rank))
    for block in (tuple(ranks) for _, ranks in blocks):
        beside += [block[place] for place in _assign(needs.local_bytes(block))]
    return tuple(beside)


def _block(job: Job, rank: int) -> tuple[int, int]:
    return rank // job.rollout_tp, rank // job.gpus_per_host


def _assign(local_bytes: np.ndarray) -> Sequence[int]:
    """For every row the column, all different, with the largest sum."""
    rows, columns = linear_sum_assignment(local_bytes, maximize=True)
    if local_bytes[rows, columns].sum() == local_bytes.trace():
        return range(len(rows))
    return [int(column) for column in columns]


class _Needs:
    """What engine ranks need of trainer ranks' shards, in bytes, of a model with one layer in every pipeline chunk."""

    def __init__(self, job: Job) -> None:
        # All layers are alike, and every chunk has as many.
        spec = replace(job.spec, num_hidden_layers=job.layout.pp * (job.layout.vpp or 1))
        targets = engine_params(spec, tp=job.rollout_tp, ep=job.rollout_ep, dtype=job.dtype)
        self._model = EngineModel(spec=spec, targets=targets, tp_size=job.rollout_tp, ep_size=job.rollout_ep)
        self._job = job
        self._sources = trainer_exports(spec, job.layout, dtype=job.dtype, gpus_per_host=job.gpus_per_host)
        self._indices: dict[ShardKey, SourceIndex] = {}
        self._bytes: dict[tuple[int, ShardKey], int] = {}

    def local_bytes(self, ranks: Sequence[int]) -> np.ndarray:
        """Of each engine rank (rows) with each of these trainer ranks (columns), both under the same numbers."""
        return np.array([[self._shared(rank % self._job.rollout_tp, other) for other in ranks] for rank in ranks])

    def _shared(self, tp_rank: int, trainer_rank: int) -> int:
        key = tp_rank, shard_key(self._job.layout, trainer_rank)
        if key not in self._bytes:
            index = self._index(key[1], self._sources[trainer_rank])
            self._bytes[key] = sum(
                overlap.num_bytes
                for target in self._model.targets
                for overlap in overlaps(target, self._model.pieces(target, tp_rank), index)
            )
        return self._bytes[key]

    def _index(self, key: ShardKey, source: SourceRank) -> SourceIndex:
        if key not in self._indices:
            self._indices[key] = SourceIndex.build(self._model.spec, [source], self._job.dtype.itemsize)
        return self._indices[key]
