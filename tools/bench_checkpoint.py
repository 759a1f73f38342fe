"""What checkpoints cost: training steps without, with synchronous and with asynchronous saves, side by side.

    python tools/bench_checkpoint.py --output docs/benchmarks/checkpoint_cpu2.json

Two ranks train an actor with the distributed optimizer. A cycle is a save and the steps after it, so that what a
background write takes from them counts; the modes take turns, so that whatever else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from benchmark_file import Row, timed_row, write
from transformers import LlamaConfig, LlamaForCausalLM

from mrl.backends.megatron.preload import preload_megatron
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit, TrainBatch

RANKS = 2
SAMPLES, LENGTH = 8, 64


@dataclass
class Measured:
    """Seconds on rank 0, one entry for each repeat."""

    cycle_s: dict[str, list[float]] = field(default_factory=dict)
    """By mode: the save, if any, and the steps after it."""
    waited_s: dict[str, list[float]] = field(default_factory=dict)
    """By mode: how long the save alone held training up."""
    num_bytes: int = 0


def make_model(folder: Path, *, layers: int) -> None:
    """A random model of about 33 + 3.2 x layers million parameters."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_batch(vocab_size: int) -> TrainBatch:
    """Full-length random samples."""
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, LENGTH)
    return TrainBatch(
        tokens=torch.randint(0, vocab_size, shape, generator=generator),
        lengths=torch.full((SAMPLES,), LENGTH),
        loss_mask=torch.ones(shape, dtype=torch.bool),
    )


def measure(env: RankEnvironment, model: Path, root: Path, *, repeats: int, steps: int) -> Measured:
    """Cycles of all modes in turn. Called by all ranks."""
    # Megatron has to be prepared for a CPU before anything imports it.
    from mrl.backends.megatron.engine import MegatronEngine
    from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
    from mrl.backends.megatron.setup import RoleSetup, build_engine
    from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer, LoopState
    from mrl.trainer.manifest import describe_role, read_manifest
    from mrl.trainer.resume import checkpoint_folder

    torch.set_num_threads(1)
    init_process_group(env, backend="gloo", timeout=timedelta(seconds=300))
    spec, layout = load_spec(model), ParallelLayout(world_size=env.world_size)
    engine: MegatronEngine = build_engine(
        RoleSetup(
            kind="actor",
            model_path=str(model),
            spec=spec,
            layout=layout,
            optimizer=OptimizerSettings(lr=1e-6),
            data_parallel=DataParallelSettings(use_distributed_optimizer=True),
        )
    )
    record = describe_role(spec, layout, dtype="float32", distributed_optimizer=True, is_critic=False)

    def checkpointer(mode: str) -> Checkpointer:
        role = CheckpointedRole(
            engine=engine,
            record=record,
            max_to_keep=1,
            copy_model_files=lambda folder: None,
            async_save=mode == "asynchronous",
        )
        return Checkpointer(root=root / mode, roles={"actor": role}, save_freq=1, total_steps=1)

    batch, limit, measured = make_batch(spec.vocab_size), MicroBatchLimit(samples=4), Measured()

    def step() -> None:
        denominator = batch.loss_mask.sum() * 1.0
        engine.update(batch, lambda output, _: (-output["log_probs"].sum() / denominator, {}), limit=limit)

    savers = {"none": None, "synchronous": checkpointer("synchronous"), "asynchronous": checkpointer("asynchronous")}
    step()
    for repeat in range(repeats + 1):
        for mode, saver in savers.items():
            begin = time.perf_counter()
            if saver is not None:
                saver.save(LoopState(step=repeat + 1, weight_version=0, prompts={}, kl_controller={}))
            waited_s = time.perf_counter() - begin
            for _ in range(steps):
                step()
                if saver is not None:
                    saver.publish_if_written()
            cycle_s = time.perf_counter() - begin
            if saver is not None:
                saver.finish()
            # The first round warms up allocators and caches.
            if repeat:
                measured.cycle_s.setdefault(mode, []).append(cycle_s)
                measured.waited_s.setdefault(mode, []).append(waited_s)
    files = read_manifest(checkpoint_folder(root / "asynchronous", repeats + 1)).files
    measured.num_bytes = sum(file.num_bytes for file in files.values())
    engine.close()
    return measured


def checksum_rows(num_bytes: int = 2**28) -> list[Row]:
    """GB/s of checksums of bytes in memory, on one core."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy()
    view = memoryview(data)
    ways: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(view).digest(),
        "crc32": lambda: zlib.crc32(view),
        "xxh3_128": lambda: xxhash.xxh3_128(view).digest(),
    }
    rates = {name: num_bytes / 1e9 / _fastest(way) for name, way in ways.items()}
    chosen = rates.pop("xxh3_128")
    return [Row(case="checksum, one core", metric="xxh3_128", value=chosen, unit="GB/s", peers=rates)]


def _fastest(work: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def rows_of(measured: Measured, *, steps: int) -> list[Row]:
    """Medians over the repeats, in ms."""
    size = f"{measured.num_bytes / 2**30:.2f} GiB, {RANKS} ranks"
    cycle = {mode: 1e3 * statistics.median(times) for mode, times in measured.cycle_s.items()}
    waited = {mode: 1e3 * statistics.median(times) for mode, times in measured.waited_s.items()}
    return [
        timed_row(
            f"save and {steps} steps, {size}",
            "asynchronous",
            cycle["asynchronous"],
            cycle["none"],
            synchronous=cycle["synchronous"],
        ),
        timed_row(
            f"save and {steps} steps, {size}",
            "synchronous",
            cycle["synchronous"],
            cycle["none"],
            asynchronous=cycle["asynchronous"],
        ),
        Row(
            case=f"training held up by a save, {size}",
            metric="asynchronous",
            value=waited["asynchronous"],
            unit="ms",
            peers={"synchronous": waited["synchronous"]},
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps after each save")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    arguments = parser.parse_args()
    rows = checksum_rows()
    preload_megatron()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_model(folder / "model", layers=arguments.layers)
        measured = run_ranks(
            lambda env: measure(
                env, folder / "model", folder / "saved", repeats=arguments.repeats, steps=arguments.steps
            ),
            RANKS,
        )[0]
    rows += rows_of(measured, steps=arguments.steps)
    for row in rows:
        print(row)
    packages = ("torch", "megatron-core", "xxhash")
    write(arguments.output, "checkpoint", rows, {package: version(package) for package in packages})


if __name__ == "__main__":
    main()
