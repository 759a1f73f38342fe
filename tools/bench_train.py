"""Training a 1.5B-shaped Qwen2 on 16,384 packed tokens: mrl's engine against megatron-core's own model and loss.

    python tools/bench_train.py --output docs/benchmarks/train_h100x1.json
    python tools/bench_train.py --world 2 --output docs/benchmarks/train_h100x2.json
    python tools/bench_train.py --device cpu --tiny

The ceiling is a bare megatron-core step in the same process: `GPTModel(labels=...)`, backward, distributed optimizer.
Model FLOP/s count two per weight of every matrix product and the half of attention that a causal mask leaves, three
times for a training step (`bench_model.flops_per_token`); what recomputation adds does not count. With --world 2 each
rank measures by itself at the same time as the other, then both together with twice the batch.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from bench_model import QWEN2_1_5B, TINY, write_model
from benchmark_file import Row, installed, write

from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group

BATCHES = ((16, 1024), (4, 4096))
TINY_BATCHES = ((16, 32), (4, 128))
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn")


def versions(*, fused_layers: bool) -> dict[str, str]:
    """Of what decides the speed; what is not installed is said to be missing.

    Args:
        fused_layers: whether megatron could import transformer-engine.
    """
    found = installed(_PACKAGES)
    if not fused_layers:
        found["transformer-engine"] += ", not importable" if "not" not in found["transformer-engine"] else ""
        found["transformer-engine"] += ": megatron's local layers were run"
    return found


def run_rank(env: RankEnvironment, arguments: argparse.Namespace, model: Path) -> None:
    """All cases of this rank; rank 0 prints every row and writes the file anew."""
    # In the rank: Megatron creates a CUDA context, which a forked process could not use. Its own imports come first.
    from mrl.backends.megatron.preload import preload_megatron

    preload_megatron()
    import train_cases
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from mrl.reshard.spec import load_spec

    # A rank that waits in the driver says where: kill -USR1.
    faulthandler.register(signal.SIGUSR1)
    device = torch.device(arguments.device, env.local_rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    init_process_group(env, backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=120))
    rows: list[Row] = []

    def report(new: list[Row]) -> None:
        if env.rank != 0:
            return
        print(*new, sep="\n", flush=True)
        rows.extend(new)
        if arguments.output:
            write(arguments.output, "train", rows, versions(fused_layers=HAVE_TE))

    job = train_cases.Job(
        model=str(model),
        spec=load_spec(model),
        device=device,
        dtype="float32" if arguments.tiny else "bfloat16",
        batches=TINY_BATCHES if arguments.tiny else BATCHES,
        repeats=arguments.repeats,
        report=report,
        only=arguments.only,
    )
    run = train_cases.run_single if arguments.world == 1 else train_cases.run_pair
    run(job)


def main() -> None:
    """Make the model, then measure on forked ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--world", type=int, choices=(1, 2), default=1)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, in float32")
    parser.add_argument(
        "--only", default="", help="parts besides the ceiling: actor,critic,recompute; all unless given"
    )
    parser.add_argument("--folder", type=Path, help="where the model is written for the run; /dev/shm saves seconds")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    # Megatron relies on one hardware queue to start communication before the product it overlaps with.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron has a few small functions compiled; processes to do that beside each other take longer to start.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    longest = max(length for _, length in (TINY_BATCHES if arguments.tiny else BATCHES))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = Path(folder) / "model"
        write_model(model, TINY if arguments.tiny else QWEN2_1_5B, max_length=longest)
        run_ranks(lambda env: run_rank(env, arguments, model), arguments.world, timeout_s=400)


if __name__ == "__main__":
    main()
