"""Shared parameter memory: visible both ways, freed with its storage, gone with its owner."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceBuffer
from mrl.reshard.transport import export_source, export_storage, open_buffer


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def fork(function):
    """Run `function` in a forked child that then exits, or stays if it never returns; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return pid


def test_views_taken_before_the_export_follow_it_and_bytes_are_seen_both_ways():
    whole = torch.arange(16, dtype=torch.float32)
    view = whole[4:8].view(2, 2)
    opened = open_buffer(export_storage(whole)).view(torch.float32)
    assert opened.tolist() == list(range(16))
    view.fill_(-1)
    assert opened[4:8].tolist() == [-1] * 4
    opened[5] = 7
    assert view[0, 1] == 7


def test_a_second_export_gives_the_same_handle():
    tensor = torch.zeros(8)
    assert export_storage(tensor) == export_storage(tensor[2:])


def test_another_process_reads_what_the_owner_writes_later():
    tensor = torch.zeros(4, dtype=torch.int64)
    buffer = export_storage(tensor)
    ready, done = os.pipe(), os.pipe()

    def child():
        opened = open_buffer(buffer).view(torch.int64)
        os.write(ready[1], b"r")
        os.read(done[0], 1)
        os._exit(0 if opened.tolist() == [5] * 4 else 2)

    pid = fork(child)
    os.read(ready[0], 1)
    tensor.fill_(5)
    os.write(done[1], b"d")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_freeing_the_storage_closes_its_descriptor_and_ends_the_handle():
    before = descriptors()
    tensor = torch.zeros(1000)
    buffer = export_storage(tensor)
    assert descriptors() != before
    del tensor
    assert descriptors() == before
    with pytest.raises(ReshardError, match="freed it or died"):
        open_buffer(buffer)


def test_nothing_is_left_behind_by_an_owner_that_was_killed():
    before = set(os.listdir("/dev/shm"))
    channel = os.pipe()

    def owner():
        tensor = torch.full((1000,), 3, dtype=torch.uint8)
        os.write(channel[1], export_storage(tensor).handle.encode())
        signal.pause()

    pid = fork(owner)
    buffer = SourceBuffer(handle=os.read(channel[0], 200).decode(), num_bytes=1000)
    opened = open_buffer(buffer)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert set(os.listdir("/dev/shm")) <= before
    assert int(opened.sum()) == 3000, "a reader's own mapping outlives the owner"
    with pytest.raises(ReshardError, match=f"process {pid}, freed it or died"):
        open_buffer(buffer)


def test_a_handle_whose_descriptor_now_means_something_else_is_refused():
    tensor = torch.zeros(8)
    buffer = export_storage(tensor)
    stolen = replace(buffer, handle=buffer.handle.rpartition(":")[0] + ":1")
    with pytest.raises(ReshardError, match="freed it or died"):
        open_buffer(stolen)
    with pytest.raises(ReshardError, match="freed it or died"):
        open_buffer(replace(buffer, num_bytes=10_000))


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ReshardError, match="unknown scheme; known: shm"):
        open_buffer(SourceBuffer(handle="carrier_pigeon:1", num_bytes=1))


def test_an_empty_storage_is_refused():
    with pytest.raises(ValueError, match="empty storage"):
        export_storage(torch.empty(0))


def test_a_source_lists_each_storage_once_with_offsets():
    flat, alone = torch.zeros(20, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    named = [("a", flat[4:8].view(2, 2)), ("b", alone), ("c", flat[8:])]
    source = export_source(named, rank=3, tp_rank=1, tp_size=2, host="h", device=-1)
    assert [(p.name, p.shape, p.buffer, p.offset_bytes) for p in source.params] == [
        ("a", (2, 2), 0, 8),
        ("b", (3,), 1, 0),
        ("c", (12,), 0, 16),
    ]
    assert ([buffer.num_bytes for buffer in source.buffers], source.dtype) == ([40, 6], "bfloat16")


def test_a_source_with_two_dtypes_or_strided_parameters_is_refused():
    where = dict(rank=0, tp_rank=0, tp_size=1, host="h", device=-1)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        export_source([("a", torch.zeros(2)), ("b", torch.zeros(2, dtype=torch.bfloat16))], **where)
    with pytest.raises(ValueError, match="only contiguous"):
        export_source([("a", torch.zeros(2, 3).t())], **where)
