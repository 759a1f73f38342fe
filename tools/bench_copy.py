"""How close the pull of a 7B-shaped model comes to the speed of memory and of the link to a peer.

    python tools/bench_copy.py --output docs/benchmarks/copy_h100.json

The trainer's buffers live in other processes and are read through CUDA IPC, as in a run. With two GPUs, plans that read
the peer's memory are measured as well. Every case is checked bit by bit before it is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from benchmark_file import Row, timed_row, write
from plan_shapes import plan_of, qwen2_7b, source_ranks
from torch import Tensor

from mrl import ops
from mrl.ops.tiles import TILE_BYTES
from mrl.reshard.plan import Plan
from mrl.reshard.spec import ModelSpec

OWN = torch.device("cuda", 0)
CEILING_BYTES = 8 << 30


@dataclass(kw_only=True, frozen=True)
class Ceilings:
    """Rates of the copy engine and driver, one way, in bytes/ms."""

    local: float
    peer: float

    def least_ms(self, local_bytes: int, remote_bytes: int) -> float:
        """Memory and link work at the same time: the slower of the two decides."""
        return max(local_bytes / self.local, remote_bytes / self.peer if remote_bytes else 0.0)


class BoundPlan:
    """A plan over other processes' buffers and freshly allocated parameters."""

    def __init__(self, plan: Plan, buffers: Sequence[int], devices: Sequence[int], tile_bytes: int) -> None:
        self._plan = plan
        self._buffers = buffers
        self.params = {t.name: torch.empty(t.num_bytes, dtype=torch.uint8, device=OWN) for t in plan.targets}
        self.remote_bytes = sum(op.num_bytes for op in plan.copies if devices[op.src_rank] != OWN.index)
        self.local_bytes = plan.stats.bytes - self.remote_bytes
        sources = torch.tensor([op.src_rank for op in plan.copies])
        self.tiles = ops.build_tiles(self._descriptors(), tile_bytes=tile_bytes, sources=sources).to(OWN)
        self.token = torch.empty(0, device=OWN)

    def _descriptors(self) -> Tensor:
        rows = [
            (
                self._buffers[op.src_rank] + op.src_offset,
                op.src_pitch,
                self.params[op.dst_param].data_ptr() + op.dst_offset,
                op.dst_pitch,
                op.rows,
                op.row_bytes,
            )
            for op in self._plan.copies
        ]
        rows += [
            (0, 0, self.params[fill.dst_param].data_ptr() + fill.dst_offset, 0, 1, fill.num_bytes)
            for fill in self._plan.fills
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def copy(self) -> None:
        ops.batched_strided_copy_(self.token, self.tiles)

    def copy_with_checksum(self) -> Tensor:
        return ops.batched_strided_copy_checksum_(self.token, self.tiles)

    def checksum(self, of_source: bool) -> Tensor:
        return ops.checksum(self.tiles, of_source=of_source)

    def check(self) -> None:
        """Raise unless a copy over poisoned parameters arrives bit by bit, with equal checksums."""
        for copy in (self.copy, self.copy_with_checksum):
            for param in self.params.values():
                param.fill_(0xA5)
            sent = copy()
            for op in self._plan.copies:
                source = _rows(self._buffers[op.src_rank] + op.src_offset, op.src_pitch, op.rows, op.row_bytes)
                arrived = self.params[op.dst_param].as_strided(source.shape, (op.dst_pitch, 1), op.dst_offset)
                if not torch.equal(source, arrived):
                    raise RuntimeError(f"{op} did not arrive")
            sums = {int(self.checksum(True)), int(self.checksum(False)), *([] if sent is None else [int(sent)])}
            if len(sums) != 1:
                raise RuntimeError(f"checksums differ: {sums}")


def _rows(pointer: int, pitch: int, rows: int, row_bytes: int) -> Tensor:
    memory = ops.tensor_from_ptr(pointer, (rows - 1) * pitch + row_bytes, OWN)
    return memory.as_strided((rows, row_bytes), (pitch, 1))


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median of the work's time on the current stream, after two rounds to warm up."""
    times = []
    for index in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if index >= 2 else []
    return statistics.median(times)


def _export(connection: Connection, num_bytes: int, device: int) -> None:
    """A trainer rank: random bytes, exported until the other side hangs up."""
    torch.cuda.set_device(device)
    words = torch.empty(-(-num_bytes // 8), dtype=torch.int64, device="cuda").random_()
    handle, offset = ops.ipc_export(words)
    torch.cuda.synchronize()
    connection.send((handle.tolist(), offset))
    with suppress(EOFError):
        connection.recv()


@contextmanager
def trainer_buffers(sizes: Sequence[int], devices: Sequence[int]) -> Iterator[list[int]]:
    """Addresses on OWN of one process's exported buffer for each size, on its device."""
    context = multiprocessing.get_context("spawn")
    links, opened = [], []
    try:
        for num_bytes, device in zip(sizes, devices, strict=True):
            link, theirs = context.Pipe()
            process = context.Process(target=_export, args=(theirs, num_bytes, device), daemon=True)
            process.start()
            theirs.close()
            links.append((link, process))
        received = [link.recv() for link, _ in links]
        opened = [(ops.ipc_open(torch.tensor(raw, dtype=torch.uint8), OWN), offset) for raw, offset in received]
        yield [pointer + offset for pointer, offset in opened]
    finally:
        torch.cuda.synchronize()
        for pointer, _ in opened:
            ops.ipc_close(pointer, OWN)
        for link, process in links:
            link.close()
            process.join()


def measure_ceilings(repeats: int) -> tuple[Ceilings, list[Row]]:
    """Plain copies of one large block: from this GPU's memory, and from the peer's if there is one."""
    target = torch.empty(CEILING_BYTES, dtype=torch.uint8, device=OWN)
    rates, rows = {}, []
    for name, device in (("local", 0), ("peer", 1)):
        if device >= torch.cuda.device_count():
            rates[name] = 0.0
            continue
        with trainer_buffers([CEILING_BYTES], [device]) as (pointer,):
            source = ops.tensor_from_ptr(pointer, CEILING_BYTES, OWN)
            descriptors = torch.tensor([[pointer, 0, target.data_ptr(), 0, 1, CEILING_BYTES]])
            tiles = ops.build_tiles(descriptors).to(OWN)
            memcpy = median_ms(lambda: target.copy_(source), repeats)  # noqa: B023
            kernel = median_ms(lambda: ops.batched_strided_copy_(target, tiles), repeats)  # noqa: B023
        rates[name] = CEILING_BYTES / memcpy
        case = f"one block of 8 GiB, {name}"
        rows.append(Row(case=case, metric="cudaMemcpyAsync", value=rates[name] / 1e6, unit="GB/s"))
        rows.append(timed_row(case, "copy_ms", kernel, memcpy))
    return Ceilings(**rates), rows


def measure_plan(
    case: str, spec: ModelSpec, devices: Sequence[int], ceilings: Ceilings, *, tile_bytes: int, repeats: int
) -> list[Row]:
    """Copy, copy with checksum, and both verifying passes of one engine rank that holds the whole model."""
    sizes = [source.buffers[0].num_bytes for source in source_ranks(spec, tp=len(devices))]
    with trainer_buffers(sizes, devices) as buffers:
        plan = plan_of(spec, source_tp=len(devices), target_tp=1)
        bound = BoundPlan(plan, buffers, devices, tile_bytes)
        bound.check()
        limit = ceilings.least_ms(bound.local_bytes, bound.remote_bytes)
        copy = median_ms(bound.copy, repeats)
        rows = [
            timed_row(case, "copy_ms", copy, limit),
            timed_row(case, "copy_checksum_ms", median_ms(bound.copy_with_checksum, repeats), limit, copy_ms=copy),
        ]
        # Reading alone moves half of the bytes of a copy: a lower bound on the time that a copy's rate implies.
        for side, of_source in (("destination", False), ("source", True)):
            value = median_ms(lambda: bound.checksum(of_source), repeats)  # noqa: B023
            rows.append(Row(case=case, metric=f"checksum_{side}_ms", value=value, unit="ms", peers={"copy_ms": copy}))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28, help="28 is the whole model, 15.2 GB")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tile-bytes", type=int, default=TILE_BYTES)
    arguments = parser.parse_args()
    ops.build_tiles(torch.empty(0, 6, dtype=torch.int64))  # Compiles here, once, and not in every exporter.
    spec = qwen2_7b(arguments.layers)
    ceilings, rows = measure_ceilings(arguments.repeats)
    cases = [("TP1 -> TP1, local", [0]), ("TP2 -> TP1, both local", [0, 0])]
    if torch.cuda.device_count() > 1:
        cases += [("TP1 -> TP1, all from the peer", [1]), ("TP2 -> TP1, half from the peer", [0, 1])]
    for case, devices in cases:
        options = {"tile_bytes": arguments.tile_bytes, "repeats": arguments.repeats}
        rows += measure_plan(case, spec, devices, ceilings, **options)
    for row in rows:
        print(row)
    write(arguments.output, "copy", rows, {"torch": torch.__version__, "cuda": str(torch.version.cuda)})


if __name__ == "__main__":
    main()
