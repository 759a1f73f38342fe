"""Conversion of a large model in both directions, against the disk's own rate in the same run, with its memory.

The model has the shape of a 7B one (Qwen2.5-7B's by default) with as many layers as the disk has room for, and random
weights. Sources are dropped from the page cache before each conversion where the system lets that happen. The bound is
the rate at which one process writes the same number of bytes to the same disk, fsync included.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from benchmark_file import Row, write

from mrl.convert.safetensors_files import SafetensorsWriter
from mrl.convert.weights import TensorInfo, row_blocks
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import spec_from_config, tensor_shapes
from mrl.reshard.hf_export import plan_files, unit_of, write_index
from mrl.reshard.spec import ModelSpec

logger = logging.getLogger("bench_convert")

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
_SAMPLE_S = 0.1
_BLOCK_BYTES = 16 * 2**20


@dataclass
class Measured:
    """One conversion, in a process of its own."""

    seconds: float
    idle_s: float
    """How long the command takes to start, imports included, and to end with nothing done."""
    idle_gib: float
    """Resident memory of the command with its imports, before it begins."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, resident GiB)."""

    @property
    def peak_gib(self) -> float:
        return max(gib for _, gib in self.curve)


def write_random_model(folder: Path, spec: ModelSpec, config: dict[str, object]) -> int:
    """A Hugging Face folder of random bfloat16 weights; returns its bytes of weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = plan_files(spec, ParallelLayout(world_size=1), bytes_per_element=2, max_file_bytes=5 * 10**9)
    shapes = tensor_shapes(spec)
    generator = torch.Generator().manual_seed(0)
    for file in files:
        tensors = {name: TensorInfo(shapes[name], torch.bfloat16) for name in file.tensors}
        with SafetensorsWriter(folder / file.name, tensors) as writer:
            for info in tensors.values():
                for rows in row_blocks(info):
                    block = torch.empty(len(rows), info.cols, dtype=torch.bfloat16)
                    # Random bits of which no exponent is that of an infinity.
                    block.view(torch.int16).random_(0, 0x4000, generator=generator)
                    writer.append(block)
            writer.finish()
    write_index(folder, files)
    return sum(file.num_bytes for file in files)


def write_rate(folder: Path, num_bytes: int, *, start_early: bool) -> float:
    """GB/s of one file written in large blocks and forced to the disk.

    Args:
        start_early: ask the system after each block to begin to write it, as the tools do, instead of at the end.
    """
    path = folder / "rate"
    block = os.urandom(_BLOCK_BYTES)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // _BLOCK_BYTES):
            file.write(block)
            if start_early:
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return num_bytes // _BLOCK_BYTES * _BLOCK_BYTES / seconds / 1e9


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the folder's pages, as if the model had been written long ago."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments: Sequence[str]) -> Measured:
    """Run `mrl convert` and sample its memory; raises if it fails."""
    command = [sys.executable, "-m", "mrl.convert.command", *arguments, "--quiet"]
    start = time.perf_counter()
    with subprocess.Popen(command) as process, _sampling(process.pid, start) as curve:
        status = process.wait()
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    seconds = time.perf_counter() - start
    idle_s, idle_gib = idle_cost()
    return Measured(seconds=seconds, idle_s=idle_s, idle_gib=idle_gib, curve=curve)


def idle_cost() -> tuple[float, float]:
    """Seconds and resident GiB of the command with its imports and nothing to do."""
    code = "import os, psutil, mrl.convert.command; print(psutil.Process(os.getpid()).memory_info().rss)"
    start = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - start, int(output) / 2**30


@contextmanager
def _sampling(pid: int, start: float) -> Iterator[list[tuple[float, float]]]:
    curve: list[tuple[float, float]] = []
    done = threading.Event()

    def sample() -> None:
        process = psutil.Process(pid)
        while not done.wait(_SAMPLE_S):
            try:
                curve.append((time.perf_counter() - start, process.memory_info().rss / 2**30))
            except psutil.NoSuchProcess:
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield curve
    finally:
        done.set()
        thread.join()


def rows_of(case: str, result: Measured, num_bytes: int, rate: float, unit_gib: float) -> list[Row]:
    """Rate against half the disk's and memory against its bound, and about fifty points of the memory's curve."""
    reached = num_bytes / result.seconds / 1e9
    bound = unit_gib + 1
    step = max(1, len(result.curve) // 50)
    points = [
        Row(case=case, metric=f"rss_at_{seconds:.1f}_s", value=gib, unit="GiB") for seconds, gib in result.curve[::step]
    ]
    return [
        Row(case=case, metric="time", value=result.seconds, unit="s"),
        Row(case=case, metric="idle_time", value=result.idle_s, unit="s"),
        Row(case=case, metric="rate", value=reached, unit="GB/s", limit=rate, ratio=reached / rate),
        Row(case=case, metric="idle_rss", value=result.idle_gib, unit="GiB"),
        Row(
            case=case, metric="peak_rss", value=result.peak_gib, unit="GiB", limit=bound, ratio=bound / result.peak_gib
        ),
        *points,
    ]


def _same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.glob("*.safetensors"))
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def largest_unit_gib(spec: ModelSpec) -> float:
    """The embedding, a layer, or what follows the layers, in bfloat16."""
    sizes: dict[int, int] = {}
    for name, shape in tensor_shapes(spec).items():
        sizes[unit_of(name, spec)] = sizes.get(unit_of(name, spec), 0) + 2 * torch.Size(shape).numel()
    return max(sizes.values()) / 2**30


def run(folder: Path, layers: int, tp: int, pp: int) -> list[Row]:
    """All rows, of files that are removed again."""
    config = {**CONFIG, "num_hidden_layers": layers}
    spec = spec_from_config(config)
    num_bytes = write_random_model(folder / "hf", spec, config)
    shape = f"{num_bytes / 2**30:.1f} GiB, {layers} layers"
    rate, early = (write_rate(folder, num_bytes, start_early=start_early) for start_early in (False, True))
    rows = [
        Row(case=shape, metric="disk_write_rate", value=rate, unit="GB/s"),
        Row(case=shape, metric="disk_write_rate_started_early", value=early, unit="GB/s"),
    ]
    commands = {
        f"hf2megatron tp{tp} pp{pp}": [
            *("hf2megatron", "--hf", str(folder / "hf"), "--out", str(folder / "megatron")),
            *("--tp", str(tp), "--pp", str(pp)),
        ],
        f"megatron2hf of tp{tp} pp{pp}": [
            *("megatron2hf", "--checkpoint", str(folder / "megatron"), "--out", str(folder / "back")),
        ],
    }
    for (case, arguments), source in zip(commands.items(), ("hf", "megatron"), strict=True):
        os.sync()
        drop_from_cache(folder / source)
        rows += rows_of(f"{case}, {shape}", measure(arguments), num_bytes, rate, largest_unit_gib(spec))
    rows.append(
        Row(case=shape, metric="bitwise_equal", value=float(_same_files(folder / "hf", folder / "back")), unit="")
    )
    return rows


def main() -> None:
    """Measure and write the results."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of the model's 28")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=arguments.folder))
    try:
        rows = run(folder, arguments.layers, arguments.tp, arguments.pp)
    finally:
        shutil.rmtree(folder)
    for row in rows:
        if not row.metric.startswith("rss_at"):
            logger.info("%s", row)
    if arguments.out:
        write(arguments.out, "convert", rows, {name: version(name) for name in ("torch", "safetensors", "mrl")})


if __name__ == "__main__":
    main()
