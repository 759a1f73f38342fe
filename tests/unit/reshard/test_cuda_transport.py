"""Exported CUDA memory, read by another process."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mrl.reshard.errors import ReshardError
from mrl.reshard.transport import close_buffers, device_number, export_source, export_storage, open_buffer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
REPOSITORY = Path(__file__).parents[3]


def own_two_parameters(link):
    """A trainer rank with two storages, which torch's allocator puts into one segment."""
    torch.cuda.set_device(0)
    first = torch.arange(1000, dtype=torch.bfloat16, device="cuda")
    second = torch.full((500,), 3.0, dtype=torch.bfloat16, device="cuda")
    number = device_number(first.device)
    named = [("a", first[:400]), ("b", second), ("c", first[400:])]
    source = export_source(named, rank=0, tp_rank=0, tp_size=1, host="h", device=number)
    torch.cuda.synchronize()
    link.send(source)
    while link.recv() == "write":
        second.fill_(7.0)
        torch.cuda.synchronize()
        link.send("written")


@contextmanager
def trainer():
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=own_two_parameters, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, link, link.recv()
    finally:
        close_buffers()
        if process.is_alive():
            link.send("end")
        process.join(60)


def values(source, param):
    memory = open_buffer(source.buffers[param.buffer])[param.offset_bytes :].view(torch.bfloat16)
    return memory[: param.shape[0]].cpu()


def test_another_process_reads_what_the_owner_writes_later_and_maps_a_segment_once():
    with trainer() as (_, link, source):
        a, b, c = source.params
        assert values(source, a).tolist() == torch.arange(400, dtype=torch.bfloat16).tolist()
        assert values(source, c).tolist() == torch.arange(1000, dtype=torch.bfloat16)[400:].tolist()
        assert values(source, b).tolist() == [3.0] * 500
        link.send("write")
        assert link.recv() == "written"
        assert values(source, b).tolist() == [7.0] * 500
        addresses = {open_buffer(source.buffers[param.buffer]).data_ptr() for param in source.params}
        assert len(addresses) == len(source.buffers) == 2
        close_buffers()
        assert values(source, b).tolist() == [7.0] * 500, "closed memory can be opened again"
        assert source.device == device_number(torch.device("cuda", 0)) >= 0


def test_a_dead_owner_is_named():
    with trainer() as (process, _, source):
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        with pytest.raises(ReshardError, match=f"exported by process {process.pid}"):
            open_buffer(source.buffers[0])


def test_own_memory_is_refused():
    with pytest.raises(ReshardError, match="another one than this"):
        open_buffer(export_storage(torch.zeros(1 << 20, device="cuda")))


def test_mapped_memory_is_refused_with_the_remedy():
    script = "import torch; from mrl.reshard.transport import export_storage; export_storage(torch.zeros(9).cuda())"
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ValueError: parameters on cuda" in result.stderr
    assert "expandable_segments:False" in result.stderr
