"""Plans across hosts: both ends of a transfer agree, nothing is sent that the receiver's host has, loads are even."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from host_cases import host_job, host_jobs
from hypothesis import given, settings
from reshard_cases import bitwise_equal, make_spec, poisoned

import mrl.reshard.sources
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.layout import sources_from_json, sources_to_json

SPEC = make_spec()
MANY = settings(max_examples=25, deadline=None)


def apply(job, op, params):
    """One copy, byte row by byte row."""
    source, target = job.memory(op.src_rank), params[op.dst_param].view(-1).view(torch.uint8)
    for row in range(op.rows):
        src, dst = op.src_offset + row * op.src_pitch, op.dst_offset + row * op.dst_pitch
        target[dst : dst + op.row_bytes] = source[src : src + op.row_bytes]


def remote_bytes_of(job, rank, params):
    """Bytes of a rank's weights that no trainer rank on its host holds, found by their values."""
    host = job.hosts[rank]
    local = [source.rank for source in job.sources if source.host == host]
    near = [tensor for source in local for tensor in job.trainer.memory[source].values()]
    words = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in near])
    wanted = torch.cat([param.reshape(-1).contiguous().view(torch.int32) for param in params.values()])
    wanted = wanted[wanted != 0]
    return 4 * int((~torch.isin(wanted, words)).sum())


@MANY
@given(build_job=host_jobs())
def test_both_ends_of_every_transfer_plan_the_same(build_job):
    job = build_job()
    plans = job.plans()
    sent = {(rank, each.peer): each.copies for rank, plan in enumerate(plans) for each in plan.sends}
    received = {(each.peer, rank): each.copies for rank, plan in enumerate(plans) for each in plan.receives}
    assert sent == received
    host_of = {source.rank: source.host for source in job.sources}
    for (sender, receiver), copies in sent.items():
        assert {host_of[op.src_rank] for op in copies} == {job.hosts[sender]} != {job.hosts[receiver]}
    assert len({plan.crosses_hosts for plan in plans}) == 1
    assert plans[0].crosses_hosts or not sent


@MANY
@given(build_job=host_jobs())
def test_every_byte_arrives_once_and_only_what_the_host_lacks_comes_from_elsewhere(build_job):
    job = build_job()
    for rank, plan in enumerate(job.plans()):
        expected = job.params(rank)
        params = poisoned(expected)
        local = {source.rank for source in job.sources if source.host == job.hosts[rank]}
        assert {op.src_rank for op in plan.copies} <= local
        written = Counter()
        for op in [*plan.copies, *(op for transfer in plan.receives for op in transfer.copies)]:
            apply(job, op, params)
            written[op.dst_param] += op.num_bytes
        for fill in plan.fills:
            params[fill.dst_param].view(-1).view(torch.uint8)[fill.dst_offset :][: fill.num_bytes] = 0
            written[fill.dst_param] += fill.num_bytes
        # As many bytes as the parameter has, and all of them right: none was written twice.
        assert written == {name: param.nbytes for name, param in expected.items()}
        assert all(bitwise_equal(params[name], expected[name]) for name in expected)
        assert plan.stats.remote_bytes == remote_bytes_of(job, rank, expected)
        assert plan.stats.local_bytes + plan.stats.same_host_bytes + plan.stats.remote_bytes == plan.stats.bytes
        assert sum(plan.stats.bytes_by_source.values()) == plan.stats.bytes


def test_a_pipeline_over_two_hosts_by_hand():
    # Two hosts of two ranks, each with a stage of two layers in TP2 and an engine of TP2. Layers are cut alike on both
    # sides; of the vocabulary's 50 rows Megatron's ranks hold 25 each, the engine's 32 and 18.
    job = host_job(SPEC, ParallelLayout(world_size=4, tp=2, pp=2), ranks_per_host=2, tp_size=2)
    plans = job.plans()
    assert [[each.peer for each in plan.receives] for plan in plans] == [[2, 3], [3], [0, 1], [1]]
    two_layers = sum(
        param.nbytes for name, param in job.params(0).items() if "layers.0." in name or "layers.1." in name
    )
    row = 8 * 4
    norm = row
    remote = [plan.stats.remote_bytes for plan in plans]
    assert remote == [two_layers + n * row + extra for n, extra in ((32, norm), (18, norm), (32, 0), (18, 0))]
    # Ranks 1 and 3 send the last 7 of the first engine rank's 32 rows and the other's 18; 2 and 3 one norm each.
    assert [plan.stats.sent_bytes for plan in plans] == [
        two_layers + 25 * row,
        two_layers + 25 * row,
        two_layers + 25 * row + norm,
        two_layers + 25 * row + norm,
    ]


@pytest.mark.parametrize(
    ("layout", "ranks_per_host", "tp_size"),
    [
        (ParallelLayout(world_size=8, pp=2), 4, 4),
        (ParallelLayout(world_size=8, pp=2), 4, 1),
        (ParallelLayout(world_size=16, tp=2, pp=4), 4, 2),
        (ParallelLayout(world_size=16, pp=2), 2, 2),
        (ParallelLayout(world_size=12, pp=2), 2, 2),
    ],
)
def test_replicas_and_senders_share_the_load(layout, ranks_per_host, tp_size):
    spec = make_spec(num_key_value_heads=8, vocab_size=64, num_hidden_layers=8)
    job = host_job(spec, layout, ranks_per_host=ranks_per_host, tp_size=tp_size)
    loads = Counter({rank: plan.stats.sent_bytes for rank, plan in enumerate(job.plans())})
    stages = [[rank for rank in loads if layout.coordinates(rank)[3] == stage] for stage in range(layout.pp)]
    for ranks in stages:
        # Within one parameter: receivers take whole boxes.
        assert max(loads[rank] for rank in ranks) <= 1.15 * sum(loads[rank] for rank in ranks) / len(ranks)


def test_few_receivers_take_from_all_replicas_alike():
    # One engine beside the second stage of two, whose first stage has four replicas on a host of its own.
    job = host_job(SPEC, ParallelLayout(world_size=8, pp=2), ranks_per_host=4, tp_size=1, num_engines=5)
    plan = job.plan(4)
    loads = [transfer.num_bytes for transfer in plan.receives]
    assert [transfer.peer for transfer in plan.receives] == [0, 1, 2, 3]
    assert max(loads) - min(loads) <= max(param.nbytes for param in job.params(4).values())


def test_who_sends_reads_its_own_device_in_whatever_order_engine_ranks_lie_there():
    job = host_job(SPEC, ParallelLayout(world_size=4, tp=2, pp=2), ranks_per_host=2, ranks_per_device=1, tp_size=2)
    job.devices = (1, 0, 3, 2)
    device_of = {source.rank: source.device for source in job.sources}
    plans = job.plans()
    for rank, plan in enumerate(plans):
        read = {device_of[op.src_rank] for transfer in plan.sends for op in transfer.copies}
        assert read == {job.devices[rank]}


def test_weights_on_a_host_without_engines_are_refused_with_the_hosts():
    job = host_job(SPEC, ParallelLayout(world_size=4, pp=2), ranks_per_host=2, tp_size=2, num_engines=1)
    with pytest.raises(
        ValueError, match=r"norm\.weight lies on host1 only, .* engines on host0; raise rollout\.num_eng"
    ):
        job.plan(0)


def test_a_host_without_engines_is_no_matter_where_others_have_its_weights():
    job = host_job(SPEC, ParallelLayout(world_size=6), ranks_per_host=2, tp_size=2, num_engines=2)
    assert [plan.stats.remote_bytes for plan in job.plans()] == [0] * 4
    assert not job.plan(0).crosses_hosts


def thousand_ranks(spec, world_size):
    """TP8 x PP16, one stage to a host of 8 ranks, an engine of TP8 to a host."""
    one = host_job(spec, ParallelLayout(world_size=128, tp=8, pp=16), ranks_per_host=8, tp_size=8)
    layout = ParallelLayout(world_size=world_size, tp=8, pp=16)
    sources = []
    for rank in range(world_size):
        tp_rank, _, _, stage = layout.coordinates(rank)
        sources.append(replace(one.sources[stage * 8 + tp_rank], rank=rank, host=f"host{rank // 8}"))
    one.sources = sources_from_json(sources_to_json(sources))
    one.hosts = tuple(f"host{rank // 8}" for rank in range(world_size))
    return one


def test_a_thousand_ranks_plan_their_own_part_only(monkeypatch):
    """Counts lookups in the layout tables and boxes looked at, whatever the clock says."""
    spec = make_spec(num_hidden_layers=16, hidden_size=8, intermediate_size=64, num_key_value_heads=8)
    counts = Counter()
    pieces, overlapping = mrl.reshard.sources.megatron_pieces, mrl.reshard.sources.SourceIndex.overlapping

    def counted_pieces(*args, **kwargs):
        counts["tables"] += 1
        return pieces(*args, **kwargs)

    def counted_overlapping(index, piece):
        for holding in overlapping(index, piece):
            counts["boxes"] += 1
            yield holding

    monkeypatch.setattr(mrl.reshard.sources, "megatron_pieces", counted_pieces)
    monkeypatch.setattr(mrl.reshard.sources.SourceIndex, "overlapping", counted_overlapping)
    work = {}
    for world_size in (128, 1024):
        job = thousand_ranks(spec, world_size)
        counts.clear()
        plan = job.plan(world_size // 2 + 3)
        work[world_size] = dict(counts)
        assert plan.stats.remote_bytes == pytest.approx(plan.stats.bytes * 15 / 16, rel=0.02)
        assert len(plan.receives) <= 15 * 8
        assert plan.stats.sent_bytes <= 1.2 * plan.stats.remote_bytes
    # Eight times the ranks, all of them replicas: not one lookup more.
    assert work[1024] == work[128]


def test_exports_of_replicas_share_their_tables_in_json():
    job = host_job(SPEC, ParallelLayout(world_size=8, tp=2), ranks_per_host=8, tp_size=8)
    data = sources_to_json(job.sources)
    assert [isinstance(entry["params"], list) for entry in data] == [True] + [False] * 7
    assert sources_from_json(data) == job.sources
