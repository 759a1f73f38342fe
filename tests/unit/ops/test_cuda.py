"""The CUDA kernels and CUDA IPC; skipped where there is no device."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans import random_plan

from mrl.ops import extension, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
REPOSITORY = Path(__file__).parents[3]


class OnDevice:
    """A random plan with its buffers on the GPU."""

    def __init__(self, seed, **size):
        self.plan = random_plan(seed, **size)
        self.source, self.target = (torch.from_numpy(array).cuda() for array in (self.plan.source, self.plan.target))
        host = self.plan.descriptors
        self.descriptors = host.clone()
        copies = host[:, 0] != 0
        self.descriptors[copies, 0] += self.source.data_ptr() - self.plan.source.ctypes.data
        self.descriptors[:, 2] += self.target.data_ptr() - self.plan.target.ctypes.data


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile_bytes", [1024, 32768])
def test_one_launch_moves_every_byte_at_any_alignment(ops, seed, tile_bytes):
    case = OnDevice(seed, num_ops=400, num_bytes=1 << 20)
    tiles = ops.build_tiles(case.descriptors, tile_bytes).cuda()
    ops.batched_strided_copy_(case.target, tiles)
    assert torch.equal(case.target.cpu(), torch.from_numpy(case.plan.expected()))


@pytest.mark.parametrize("seed", range(3))
def test_checksums_are_those_of_the_cpu(compiled, seed):
    case = OnDevice(seed, num_ops=400, num_bytes=1 << 20)
    on_host = compiled.build_tiles(case.plan.descriptors, 1024)
    expected = compiled.batched_strided_copy_checksum_(torch.empty(0), on_host)
    tiles = compiled.build_tiles(case.descriptors, 4096).cuda()
    for _ in range(2):
        assert torch.equal(compiled.batched_strided_copy_checksum_(case.target, tiles).cpu(), expected)
    assert torch.equal(compiled.checksum(tiles, False).cpu(), expected)
    assert torch.equal(compiled.checksum(tiles, True).cpu(), expected)


def test_launches_follow_the_current_stream(compiled):
    source = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    descriptors = torch.tensor([[source.data_ptr(), 0, target.data_ptr(), 0, 1, source.numel()]])
    tiles = compiled.build_tiles(descriptors, 32768).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.fill_(7)
        compiled.batched_strided_copy_(target, tiles)
    stream.synchronize()
    assert (target == 7).all()


@pytest.mark.parametrize("seed", range(3))
def test_reference_checksums_are_those_of_the_kernels(compiled, seed):
    case = OnDevice(seed, num_ops=100, num_bytes=1 << 18)
    tiles = compiled.build_tiles(case.descriptors, 4096).cuda()
    for of_source in (True, False):
        assert torch.equal(compiled.checksum(tiles, of_source), reference.checksum(tiles, of_source))


def test_tiles_and_anchor_must_share_a_device(compiled):
    tiles = torch.zeros(3, 8, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="anchor on cpu and tiles on cuda:0 must be on one device"):
        compiled.batched_strided_copy_(torch.empty(0), tiles)


def export_and_wait(connection, with_reference):
    ops = reference if with_reference else extension.backend()
    base = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    handle, offset = ops.ipc_export(base[1000:])
    torch.cuda.synchronize()
    connection.send((handle.tolist(), offset))
    connection.recv()


def test_another_process_reads_an_exported_buffer(ops):
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=export_and_wait, args=(theirs, ops is reference), daemon=True)
    process.start()
    handle, offset = link.recv()
    own = torch.device("cuda", 0)
    pointer = ops.ipc_open(torch.tensor(handle, dtype=torch.uint8), own)
    seen = ops.tensor_from_ptr(pointer + offset, 4000, own).view(torch.int32).cpu()
    ops.ipc_close(pointer, own)
    link.send("done")
    process.join(30)
    assert torch.equal(seen, torch.arange(1000, 2000, dtype=torch.int32))


def test_own_memory_cannot_be_opened(compiled):
    memory = torch.empty(1 << 22, device="cuda")
    handle, _ = compiled.ipc_export(memory)
    with pytest.raises(RuntimeError, match="another one than this"):
        compiled.ipc_open(handle, torch.device("cuda"))


def test_mapped_memory_is_refused_with_the_remedy(compiled):
    script = "import torch; from mrl import ops; ops.ipc_export(torch.empty(1 << 22, device='cuda'))"
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "expandable_segments:False" in result.stderr
