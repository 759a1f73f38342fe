"""Memory that waits on the host: when it is freed, what is copied, and where tensors lie afterwards."""

from __future__ import annotations

import pytest
import torch
from late_copier import LateCopier

from mrl.backends import host_copies
from mrl.backends.host_copies import CudaCopier, HostCopies, HostSpace


def round_trip(copies, tensors, copier):
    copies.leave(tensors)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    copies.arrive()
    copies.wait()


@pytest.fixture
def copier(monkeypatch):
    monkeypatch.setattr(host_copies, "_SLAB_BYTES", 1024)
    monkeypatch.setattr(host_copies, "_ARENA_BYTES", 4096)
    return LateCopier()


def make(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize("packs", [False, True])
def test_tensors_keep_identity_and_values_over_many_trips(copier, packs):
    tensors = [*make(3, 300, 1, 1500, 64), torch.arange(7)]
    copies = HostCopies(copier, packs=packs)
    for trip in range(4):
        expected = [tensor.clone() for tensor in tensors]
        round_trip(copies, tensors, copier)
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, expected, strict=True))
        tensors[trip].add_(1)
        copies.mark_changed()


def test_each_piece_is_freed_after_its_own_copies_and_before_the_next_piece_is_copied(copier):
    copies = HostCopies(copier, packs=True)
    tensors = make(100, 700)
    copies.leave(tensors)
    # 2,800 bytes lie at 512 on the host, whose slabs have 1,024.
    assert copier.log == ["out", 400, "free", 512, 1024, 1024, 240, "free"]
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
    assert len(copier.queue) == 5, "nothing has waited for a copy"


def test_small_tensors_return_into_few_storages(copier):
    tensors = make(*[20] * 30)
    copies = HostCopies(copier, packs=True)
    round_trip(copies, tensors, copier)
    # 8 of 80 bytes, each aligned to 512, fill an arena of 4,096.
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 4
    copies.mark_changed()
    copies.leave(tensors)
    assert copier.log.count("free") == 30 + 4


def test_what_has_not_changed_is_freed_without_a_copy(copier):
    tensors = make(50)
    expected = tensors[0].clone()
    copies = HostCopies(copier, packs=False)
    round_trip(copies, tensors, copier)
    copier.log.clear()
    copies.leave(tensors, only_if_unchanged=True)
    assert (copier.log, tensors[0].untyped_storage().nbytes()) == ([], 0)
    copies.arrive()
    copies.wait()
    assert torch.equal(tensors[0], expected)


def test_what_has_changed_stays_where_nothing_may_be_copied(copier):
    tensors = make(50)
    copies = HostCopies(copier, packs=False)
    copies.leave(tensors, only_if_unchanged=True)
    round_trip(copies, tensors, copier)
    copies.mark_changed()
    copies.leave(tensors, only_if_unchanged=True)
    assert (copies.is_away, tensors[0].untyped_storage().nbytes()) == (False, 200)


def test_views_of_a_shared_storage_stay_views(copier):
    flat = torch.arange(100.0)
    views = [flat[:40], flat[40:90]]
    copies = HostCopies(copier, packs=True)
    round_trip(copies, views, copier)
    flat[0], flat[89] = -1, -2
    assert (views[0][0], views[1][-1]) == (-1, -2)
    assert torch.equal(flat[1:89], torch.arange(1.0, 89.0))


def test_tensors_that_appear_or_are_replaced_later_travel_too(copier):
    tensors = make(10, 20)
    copies = HostCopies(copier, packs=True)
    round_trip(copies, tensors, copier)
    tensors = [tensors[0], *make(20, 30, seed=1)]
    for _ in range(3):
        expected = [tensor.clone() for tensor in tensors]
        round_trip(copies, tensors, copier)
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, expected, strict=True))


def test_leaving_before_the_arrival_was_waited_for_loses_nothing(copier):
    tensors = make(10)
    expected = tensors[0].clone()
    copies = HostCopies(copier, packs=True)
    round_trip(copies, tensors, copier)
    copies.leave(tensors)
    copies.arrive()
    copies.mark_changed()
    copies.leave(tensors)
    copies.arrive()
    copies.wait()
    assert torch.equal(tensors[0], expected)


def test_a_second_departure_or_arrival_changes_nothing(copier):
    tensors = make(10)
    copies = HostCopies(copier, packs=True)
    copies.leave(tensors)
    copies.leave(tensors)
    copies.arrive()
    copies.arrive()
    assert copier.log.count("out") == copier.log.count("in") == 1


def test_host_memory_is_allocated_once_in_powers_of_two(copier):
    tensors = make(500, 400)
    copies = HostCopies(copier, packs=True)
    for _ in range(3):
        round_trip(copies, tensors, copier)
        copies.mark_changed()
    # 2,048 and 1,600 bytes: three slabs of 1,024 and one for the 576 that are left.
    assert copier.allocated == 4 * 1024


def test_host_addresses_run_through_slabs(copier):
    space = HostSpace(copier.allocate_host)
    space.grow(2500)
    pieces = [(host.numel(), offset) for host, offset in space.pieces(1000, 1200)]
    assert pieces == [(24, 0), (1024, 24), (152, 1048)]
    assert space.num_bytes == 2048 + 512


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_values_survive_while_their_memory_is_wanted():
    tensors = [torch.randn(2**22, device="cuda") for _ in range(32)]
    expected = [tensor.cpu() for tensor in tensors]
    copies = HostCopies(CudaCopier(), packs=True)
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        copies.leave(tensors)
        assert torch.cuda.memory_allocated() <= before - sum(tensor.numel() * 4 for tensor in tensors)
        # Takes the freed blocks as soon as it may, and overwrites them.
        others = [torch.full((2**22,), -1.0, device="cuda") for _ in range(32)]
        del others
        copies.arrive()
        copies.wait()
        assert all(torch.equal(tensor.cpu(), value) for tensor, value in zip(tensors, expected, strict=True))
        copies.mark_changed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_reclaimed_memory_is_free_for_other_processes():
    tensors = [torch.zeros(2**28, dtype=torch.uint8, device="cuda") for _ in range(4)]
    copies = HostCopies(CudaCopier(), packs=True)
    copies.leave(tensors)
    copies.arrive()
    copies.wait()
    copies.mark_changed()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    copies.leave(tensors)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= before + 2**30
