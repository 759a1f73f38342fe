"""Engine ranks run where most of what they need lies; hand-worked layouts, and every permutation of small ones."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from scale_jobs import DENSE, EXPERTS, JOBS, job, plans

from mrl.scale.placement import place_engines
from mrl.scale.traffic import plan_traffic

# Heads and sizes that eight ranks divide.
WIDE = dataclasses.replace(DENSE, num_attention_heads=16, num_key_value_heads=8, intermediate_size=128)


def local_bytes(job, beside) -> int:
    """Of all engine ranks together, from their whole plans."""
    return sum(plan.stats.local_bytes for plan in plans(job, beside))


@pytest.mark.parametrize(
    ("given", "beside"),
    [
        # Halves lie on even and odd ranks; an engine rank needs a quarter.
        (job(DENSE, world_size=4, tp=2, rollout_tp=4), (0, 2, 1, 3)),
        (job(DENSE, world_size=4, tp=2, rollout_tp=2), (0, 1, 2, 3)),
        (job(DENSE, world_size=4, pp=4, rollout_tp=2), (0, 1, 2, 3)),
        # Never to another host: two ranks each, of which the second has nothing to gain.
        (job(DENSE, world_size=4, tp=2, rollout_tp=4, gpus_per_host=2), (0, 1, 2, 3)),
    ],
)
def test_ranks_lie_where_their_weights_are(given, beside):
    assert place_engines(given) == beside


def test_half_of_the_weights_are_local_where_two_stages_share_a_host():
    given = job(WIDE, world_size=8, tp=4, pp=2, rollout_tp=8, gpus_per_host=8)
    beside = place_engines(given)
    # Each quarter of the model lies on two GPUs, half of its layers on either; two engine ranks share it.
    assert [set(beside[place : place + 2]) for place in range(0, 8, 2)] == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    in_order, placed = (local_bytes(given, order) for order in (range(8), beside))
    assert in_order < 0.3 * placed
    assert plan_traffic(given).mean("local_bytes") * 8 == placed


@pytest.mark.parametrize(
    "given",
    [
        job(DENSE, world_size=4, tp=2, rollout_tp=4),
        job(DENSE, world_size=4, tp=2, pp=2, rollout_tp=4),
        job(EXPERTS, world_size=4, ep=4, rollout_tp=4),
        job(EXPERTS, world_size=4, tp=2, ep=2, rollout_tp=4, rollout_ep=2),
    ],
    ids=["replicas", "stages", "experts", "experts dealt out"],
)
def test_no_other_order_has_more_local_bytes(given):
    best = max(local_bytes(given, order) for order in itertools.permutations(range(4)))
    assert local_bytes(given, place_engines(given)) == best


@pytest.mark.parametrize("case", JOBS)
def test_every_engine_keeps_its_ranks_on_every_host(case):
    given = JOBS[case]
    beside = place_engines(given)
    assert sorted(beside) == list(range(given.num_engines * given.rollout_tp))
    for rank, trainer_rank in enumerate(beside):
        assert rank // given.rollout_tp == trainer_rank // given.rollout_tp
        assert rank // given.gpus_per_host == trainer_rank // given.gpus_per_host
