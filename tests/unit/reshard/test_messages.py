"""Transfers cut into messages: every byte once, in order, in bounded size, and one order for all ranks."""

from dataclasses import replace

from host_cases import host_job
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import make_spec

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.messages import build_messages, cut, transfer_digest
from mrl.reshard.operations import CopyOp


def op(src=0, dst=0, rows=1, row_bytes=8, src_pitch=8, dst_pitch=8):
    return CopyOp(0, 0, src, src_pitch, "w", dst, dst_pitch, rows, row_bytes)


def places(copies):
    """(source byte, target byte) of every byte, in the order of the wire."""
    return [
        (each.src_offset + row * each.src_pitch + byte, each.dst_offset + row * each.dst_pitch + byte)
        for each in copies
        for row in range(each.rows)
        for byte in range(each.row_bytes)
    ]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20).map(lambda n: 2 * n)), max_size=6),
    capacity=st.integers(1, 12).map(lambda n: 8 * n),
)
def test_cut_copies_are_the_same_bytes_in_the_same_order(sizes, capacity):
    copies = [
        op(src=1000 * i, dst=2000 * i, rows=rows, row_bytes=size, src_pitch=size + 2, dst_pitch=size + 6)
        for i, (rows, size) in enumerate(sizes)
    ]
    groups = list(cut(copies, capacity))
    assert [place for group in groups for place in places(group)] == places(copies)
    loads = [sum(each.num_bytes for each in group) for group in groups]
    assert all(0 < load <= capacity for load in loads)
    # A group is left only when the next row does not fit.
    widest = max((min(size, capacity) for _, size in sizes), default=0)
    assert all(load + widest > capacity for load in loads[:-1])


def test_a_copy_is_cut_between_rows_and_a_long_row_within():
    rows = op(rows=3, src_pitch=16, dst_pitch=32)
    assert list(cut([rows], 16)) == [
        [replace(rows, rows=2)],
        [replace(rows, rows=1, src_offset=32, dst_offset=64)],
    ]
    run = op(row_bytes=20, src_pitch=20, dst_pitch=20)
    assert [(each.src_offset, each.row_bytes) for (each,) in cut([run], 8)] == [(0, 8), (8, 8), (16, 4)]


def test_both_ends_of_a_message_have_it_at_one_place_of_one_order():
    job = host_job(make_spec(), ParallelLayout(world_size=8, tp=2, pp=4), ranks_per_host=2, tp_size=2)
    messages = [build_messages(plan, rank=rank, num_ranks=8, capacity=512) for rank, plan in enumerate(job.plans())]
    sent = {(each.order, rank, each.peer): each.parts for rank in range(8) for each in messages[rank] if each.sending}
    received = {
        (each.order, each.peer, rank): each.parts for rank in range(8) for each in messages[rank] if not each.sending
    }
    assert sent == received
    assert len({order for order, _, _ in sent}) == len(sent) > 8
    assert all(own == sorted(own, key=lambda each: each.order) for own in messages)


def test_transfers_of_other_copies_have_other_digests():
    job = host_job(make_spec(), ParallelLayout(world_size=2, pp=2), ranks_per_host=1, tp_size=1)
    first, second = job.plan(0).receives[0], job.plan(1).sends[0]
    assert transfer_digest(first) == transfer_digest(second)
    assert transfer_digest(first) != transfer_digest(replace(first, copies=first.copies[1:]))
