"""What is said about memory; most of it needs a device."""

from __future__ import annotations

import pytest
import torch

from mrl.observability.memory import GIB, CudaMemory, peak_memory_gib

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a device its peak is reported")
def test_without_a_device_the_peak_is_that_of_the_process():
    before = peak_memory_gib()
    block = torch.ones(2**26)
    assert peak_memory_gib() >= before
    assert peak_memory_gib() >= block.nbytes / GIB


@needs_device
def test_memory_is_told_by_who_holds_it_and_unused_memory_goes_back():
    memory = CudaMemory()
    memory.reclaim()
    free = memory.free()
    block = torch.ones(2**28, device="cuda")
    metrics = memory.metrics("now")
    assert metrics["memory/now_allocated_gib"] >= 1.0
    assert metrics["memory/now_reserved_gib"] >= metrics["memory/now_allocated_gib"]
    assert metrics["memory/now_gib"] >= metrics["memory/now_reserved_gib"]
    del block
    assert memory.free() < free
    memory.reclaim()
    assert memory.free() >= free


@needs_device
def test_the_residue_is_what_tensors_do_not_explain():
    memory = CudaMemory()
    before = memory.residue_metrics()
    block = torch.ones(2**28, device="cuda")
    after = memory.residue_metrics()
    assert after["memory/residue_gib"] == pytest.approx(before["memory/residue_gib"], abs=0.1)
    assert after["memory/residue_at_start_gib"] == before["memory/residue_at_start_gib"]
    assert block.numel()


@needs_device
def test_pinned_memory_is_reported():
    block = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    assert CudaMemory().residue_metrics()["memory/host_pinned_gib"] >= block.nbytes / GIB
