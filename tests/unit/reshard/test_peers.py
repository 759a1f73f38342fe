"""Copies by the copy engines: reader and witness plan the same ones, and their sums agree exactly when the bytes do."""

import pytest
import torch
from host_cases import host_job, host_jobs
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import bitwise_equal, make_spec, poisoned

from mrl import ops
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.peer_reads import served_tiles, split_reads
from mrl.reshard.peer_sums import PeerSums, check_peer_sums

SPEC = make_spec()
ANY_SIZE = 1
TOKEN = torch.empty(0)
MANY = settings(max_examples=25, deadline=None)


def flat(params):
    return {name: param.view(-1).view(torch.uint8) for name, param in params.items()}


def pairs(plans):
    """What every rank reads and serves, by (reader, witness)."""
    read = {(rank, each.peer): each.copies for rank, plan in enumerate(plans) for each in plan.reads}
    served = {(each.peer, rank): each.copies for rank, plan in enumerate(plans) for each in plan.serves}
    return read, served


@MANY
@given(
    build_job=host_jobs(ranks_per_device=st.sampled_from([1, 2])),
    least=st.sampled_from([1, 100, 1000]),
    alias=st.booleans(),
)
def test_a_witness_serves_what_is_read_from_its_device_in_the_same_order(build_job, least, alias):
    job = build_job()
    plans = job.plans(copy_engine_bytes=least, alias=alias)
    read, served = pairs(plans)
    assert read == served
    device_of = {source.rank: source.device for source in job.sources}
    for (reader, owner), copies in read.items():
        assert job.hosts[reader] == job.hosts[owner]
        assert {device_of[op.src_rank] for op in copies} == {job.devices[owner]} != {job.devices[reader]}
        assert min(op.num_bytes for op in copies) >= least
    for rank, plan in enumerate(plans):
        # Every device has an engine rank, so what a kernel reads elsewhere is small.
        for op in plan.copies:
            assert op.num_bytes < least or device_of[op.src_rank] == job.devices[rank]
        assert plan.stats.copy_engine_bytes == sum(each.num_bytes for each in plan.reads)


@MANY
@given(build_job=host_jobs(ranks_per_device=st.just(1)))
def test_places_change_no_copy_only_who_makes_it(build_job):
    job = build_job()
    for rank in range(len(job.hosts)):
        plan = job.plan(rank, copy_engine_bytes=ANY_SIZE)
        by_kernel = job.plan(rank, copy_engine_bytes=1 << 40)
        assert not by_kernel.reads
        assert not by_kernel.serves
        assert sorted(map(repr, plan.host_copies)) == sorted(map(repr, by_kernel.copies))
        assert (plan.stats.bytes, plan.stats.copies) == (by_kernel.stats.bytes, by_kernel.stats.copies)
        assert plan.stats.same_host_bytes == by_kernel.stats.same_host_bytes


def test_bytes_of_a_device_without_an_engine_rank_are_the_kernels():
    job = host_job(
        SPEC, ParallelLayout(world_size=4, pp=4), ranks_per_host=4, ranks_per_device=1, tp_size=1, num_engines=2
    )
    plan = job.plan(0, copy_engine_bytes=ANY_SIZE)
    assert [(each.peer, {op.src_rank for op in each.copies}) for each in plan.reads] == [(1, {1})]
    assert {op.src_rank for op in plan.copies} == {0, 2, 3}


def test_a_device_of_several_engine_ranks_has_one_witness():
    job = host_job(SPEC, ParallelLayout(world_size=4, pp=2), ranks_per_host=4, ranks_per_device=2, tp_size=1)
    plans = job.plans(copy_engine_bytes=ANY_SIZE)
    assert {pair for pair in pairs(plans)[0]} == {(0, 2), (1, 2), (2, 0), (3, 0)}
    assert not plans[1].serves
    assert not plans[3].serves


def test_small_copies_are_the_kernels():
    job = host_job(SPEC, ParallelLayout(world_size=2, tp=2), ranks_per_host=2, ranks_per_device=1, tp_size=1)
    plan = job.plan(0, copy_engine_bytes=256)
    assert min(op.num_bytes for each in plan.reads for op in each.copies) >= 256
    assert 0 < max(op.num_bytes for op in plan.copies if op.src_rank == 1) < 256
    assert job.plan(0).reads == ()


def test_where_devices_are_not_known_the_kernel_copies_all():
    job = host_job(SPEC, ParallelLayout(world_size=2, tp=2), ranks_per_host=2, ranks_per_device=1, tp_size=1)
    job.devices = None
    plan = job.plan(0, copy_engine_bytes=ANY_SIZE)
    assert (plan.reads, plan.serves) == ((), ())


def test_a_rank_that_is_not_where_the_others_take_it_to_be_is_refused():
    job = host_job(SPEC, ParallelLayout(world_size=2, tp=2), ranks_per_host=2, ranks_per_device=1, tp_size=2)
    with pytest.raises(ValueError, match=r"engine rank 1 runs on device 0x5 of host0, .* device 0x1"):
        job.plan(1, device=5, copy_engine_bytes=ANY_SIZE)


def copy_all(job, plans, *, piece_bytes):
    """Make every rank's reads on the CPU, portion by portion; what each rank reports, and its parameters."""
    buffers = [open_sources(plan, job.sources) for plan in plans]
    params = [poisoned(job.params(rank)) for rank in range(len(plans))]
    reports = []
    for plan, memory, own in zip(plans, buffers, params, strict=True):
        arrived = dict.fromkeys((each.peer for each in plan.reads), 0)
        for portion in split_reads(plan.reads, memory, flat(own), rank=plan.rank, piece_bytes=piece_bytes):
            ops.copy_engine_copy_(TOKEN, portion.descriptors)
            for owner, tiles in portion.tiles.items():
                arrived[owner] = (arrived[owner] + int(ops.checksum(tiles, of_source=False))) % 2**64
        served = {
            reader: int(ops.checksum(tiles, of_source=True)) % 2**64
            for reader, tiles in served_tiles(plan.serves, memory).items()
        }
        reports.append(PeerSums(rank=plan.rank, arrived=arrived, served=served))
    return reports, params


@settings(max_examples=15, deadline=None)
@given(build_job=host_jobs(ranks_per_device=st.just(1)), piece_bytes=st.sampled_from([16, 176, 1 << 20]))
def test_sums_of_both_ends_agree_however_the_copies_are_cut(build_job, piece_bytes):
    job = build_job()
    plans = job.plans(copy_engine_bytes=ANY_SIZE)
    reports, params = copy_all(job, plans, piece_bytes=piece_bytes)
    check_peer_sums(reports, whole_job=True)
    for plan, own in zip(plans, params, strict=True):
        expected = job.params(plan.rank)
        read = {op.dst_param for op in plan.host_copies} - {op.dst_param for op in (*plan.copies, *plan.fills)}
        read -= {op.dst_param for transfer in plan.receives for op in transfer.copies}
        assert all(bitwise_equal(own[name], expected[name]) for name in read)


def test_portions_are_about_equal_and_take_the_devices_in_turns():
    job = host_job(SPEC, ParallelLayout(world_size=4, pp=4), ranks_per_host=4, ranks_per_device=1, tp_size=1)
    plan = job.plan(1, copy_engine_bytes=ANY_SIZE)
    memory, params = open_sources(plan, job.sources), poisoned(job.params(1))
    portions = split_reads(plan.reads, memory, flat(params), rank=1, piece_bytes=256)
    sizes = [int((portion.descriptors[:, 4] * portion.descriptors[:, 5]).sum()) for portion in portions]
    assert len(portions) > 4
    assert sum(sizes) == plan.stats.copy_engine_bytes
    assert max(sizes) - min(sizes) <= 2 * 256
    read = portions[0].descriptors[:3, 0].tolist()
    for address, owner in zip(read, (2, 3, 0), strict=True):
        assert 0 <= address - memory[owner, 0].data_ptr() < memory[owner, 0].numel()
    assert {owner for portion in portions[:3] for owner in portion.tiles} == {0, 2, 3}


def test_torch_copies_leave_nothing_to_compare():
    job = host_job(SPEC, ParallelLayout(world_size=2, tp=2), ranks_per_host=2, ranks_per_device=1, tp_size=1)
    reports = []
    for rank, plan in enumerate(job.plans(copy_engine_bytes=ANY_SIZE)):
        params = poisoned(job.params(rank))
        result = Puller(plan, open_sources(plan, job.sources), params).pull()
        assert all(bitwise_equal(params[name], expected) for name, expected in job.params(rank).items())
        assert (result.bytes, result.ops) == (plan.stats.bytes, plan.stats.copies + plan.stats.fills)
        reports.append(result.sums)
    assert [(each.arrived, each.served) for each in reports] == [({1: None}, {1: None}), ({0: None}, {0: None})]
    check_peer_sums(reports, whole_job=True)


@pytest.mark.parametrize("side", ["arrived", "served"])
def test_one_changed_bit_is_found_with_both_ranks(side):
    job = host_job(SPEC, ParallelLayout(world_size=2, pp=2), ranks_per_host=2, ranks_per_device=1, tp_size=1)
    plans = job.plans(copy_engine_bytes=ANY_SIZE)
    reports, params = copy_all(job, plans, piece_bytes=256)
    op = plans[0].reads[0].copies[-1]
    if side == "arrived":
        flat(params[0])[op.dst_param][op.dst_offset] ^= 64
    else:
        job.memory(op.src_rank)[op.src_offset] ^= 64
    memory = [open_sources(plan, job.sources) for plan in plans]
    [tiles] = [
        portion.tiles[1]
        for portion in split_reads(plans[0].reads, memory[0], flat(params[0]), rank=0, piece_bytes=1 << 30)
    ]
    arrived = int(ops.checksum(tiles, of_source=False)) % 2**64
    served = int(ops.checksum(served_tiles(plans[1].serves, memory[1])[0], of_source=True)) % 2**64
    changed = [
        PeerSums(rank=0, arrived={1: arrived}, served=reports[0].served),
        PeerSums(rank=1, arrived=reports[1].arrived, served={0: served}),
    ]
    with pytest.raises(ReshardError, match=rf"engine rank 0 read .* engine rank 1: .* {arrived:#x}, .* {served:#x};"):
        check_peer_sums(changed, whole_job=True)
