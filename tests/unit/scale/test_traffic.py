"""Sizes of a reshard from the plans of a few ranks, against the plans of all."""

import dataclasses

import pytest
from scale_jobs import DENSE, JOBS, job, plans

from mrl.reshard.layout import as_matrix
from mrl.scale.exports import engine_params
from mrl.scale.placement import place_engines
from mrl.scale.traffic import plan_traffic

SIZES = ("bytes", "local_bytes", "same_host_bytes", "remote_bytes", "fills", "fill_bytes")


@pytest.mark.parametrize("case", JOBS)
def test_ranks_of_a_group_move_what_its_first_one_moves(case):
    traffic, each = plan_traffic(JOBS[case]), plans(JOBS[case], place_engines(JOBS[case]))
    assert sorted(rank for group in traffic.groups for rank in group.ranks) == list(range(len(each)))
    assert len(traffic.groups) < len(each)
    for group in traffic.groups:
        for rank in group.ranks:
            for size in SIZES:
                assert getattr(each[rank].stats, size) == getattr(group.stats, size), (rank, size)
    for size in SIZES[:4]:
        assert traffic.mean(size) * len(each) == pytest.approx(sum(getattr(plan.stats, size) for plan in each))
    assert sum(plan.stats.sent_bytes for plan in each) == sum(plan.stats.remote_bytes for plan in each)


@pytest.mark.parametrize("alias", [False, True], ids=["copied", "aliased"])
@pytest.mark.parametrize("case", JOBS)
def test_every_engine_gets_the_whole_model(case, alias):
    given = dataclasses.replace(JOBS[case], alias=alias)
    traffic = plan_traffic(given)
    params = engine_params(given.spec, tp=given.rollout_tp, ep=given.rollout_ep, dtype=given.dtype)
    held = sum(as_matrix(param.shape)[0] * as_matrix(param.shape)[1] * 2 for param in params)
    assert traffic.mean("bytes") + traffic.mean("fill_bytes") + traffic.mean("aliased_bytes") == held
    assert (traffic.mean("aliased_bytes") > 0) == alias


def test_traffic_of_a_hand_worked_case():
    # Two hosts of two GPUs, one stage each; every engine rank is beside half of the layers. A layer's q, k, v and o
    # rows, gate, up and down are 32 x (32 + 8 + 8 + 32 + 3 x 64), its norms 2 x 32.
    traffic = plan_traffic(job(DENSE, world_size=4, pp=2, rollout_tp=1, gpus_per_host=2))
    layer, matrix, norm = 32 * 272 + 64, 256 * 32, 32
    near_first, near_last = 2 * layer + matrix, 2 * layer + matrix + norm
    assert [group.ranks for group in traffic.groups] == [(0, 1), (2, 3)]
    moved = [(group.stats.local_bytes, group.stats.remote_bytes) for group in traffic.groups]
    assert moved == [(2 * near_first, 2 * near_last), (2 * near_last, 2 * near_first)]
    assert traffic.mean("same_host_bytes") == 0


def test_a_vocabulary_that_both_sides_cut_alike_is_aliased():
    # 192 is a multiple of 64, but not of 128 times two: whoever pads it further for the trainer finds other cuts.
    given = job(dataclasses.replace(DENSE, vocab_size=192), world_size=2, tp=2, rollout_tp=2, gpus_per_host=2)
    traffic = plan_traffic(dataclasses.replace(given, alias=True))
    assert [group.stats.bytes for group in traffic.groups] == [0] * len(traffic.groups)


def test_a_sample_of_the_groups_is_the_same_each_time_and_says_how_many_there_are():
    given = JOBS["stages on hosts of their own"]
    sample = plan_traffic(given, most_groups=3)
    assert (len(sample.groups), sample.num_ranks) == (3, 32)
    assert sample.num_groups == len(plan_traffic(given).groups)
    assert sample == plan_traffic(given, most_groups=3)
