"""Time of a pass and of an update with samples padded or packed, on forked CPU ranks.

    OMP_NUM_THREADS=1 python tools/bench_packing.py --output docs/benchmarks/packing_cpu2.json

All ways compute the same numbers. "wide" has lengths from 16 to 512 tokens, log-uniform, on one rank; "short" is of
the demo's shape, 12 to 40 tokens, on TP2 x PP2. Both are limited by tokens or by samples. The bound of a packed case is
the padded one's time times the share of tokens that are not padding: attention, which grows with the square of the
length, may save more.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from benchmark_file import Row, write
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.optimizer import OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.interfaces import ModelOutput
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import Metric, MicroBatchLimit, TrainBatch

VOCAB = 512


@dataclass(kw_only=True, frozen=True)
class Case:
    """A batch, a layout and the limit of its micro-batches."""

    name: str
    shortest: int
    longest: int
    samples: int
    hidden: int
    limit: MicroBatchLimit
    world_size: int = 1
    tp: int = 1
    pp: int = 1


WIDE = {"shortest": 16, "longest": 512, "samples": 32, "hidden": 128}
SHORT = {"shortest": 12, "longest": 40, "samples": 32, "hidden": 128, "world_size": 4, "tp": 2, "pp": 2}
CASES = (
    Case(name="wide, 1,024 tokens", limit=MicroBatchLimit(tokens=1024), **WIDE),
    Case(name="wide, 8 samples", limit=MicroBatchLimit(samples=8), **WIDE),
    Case(name="short, 16 samples", limit=MicroBatchLimit(samples=16), **SHORT),
    Case(name="short, 512 tokens", limit=MicroBatchLimit(tokens=512), **SHORT),
)


def make_batch(case: Case) -> TrainBatch:
    """Random tokens; lengths log-uniform between the case's."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(case.samples, generator=generator)
    lengths = (case.shortest * (case.longest / case.shortest) ** share).round().long()
    inside = torch.arange(case.longest) < lengths[:, None]
    tokens = torch.randint(0, VOCAB, inside.shape, generator=generator) * inside
    return TrainBatch(tokens=tokens, lengths=lengths, loss_mask=inside)


def mean_log_prob(mini_batch: TrainBatch) -> Callable[[ModelOutput, TrainBatch], tuple[Tensor, dict[str, Metric]]]:
    """Minus the mean log-prob and the mean entropy of the mini-batch."""
    count = mini_batch.loss_mask.sum()

    def loss_fn(output: ModelOutput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
        return -((output["log_probs"] + 0.01 * output["entropy"]) * batch.loss_mask).sum() / count, {}

    return loss_fn


def save_model(folder: Path, hidden: int, max_length: int) -> str:
    """A random four-layer Qwen2."""
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def measure(case: Case, model: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Median times of both ways in turns, in ms, and what they computed. Called by all ranks."""
    engines = {way: _engine(case, model, packed=way == "packed") for way in ("padded", "packed")}
    batch = make_batch(case)
    results: dict[str, dict[str, Any]] = {way: {"log_prob_ms": [], "update_ms": []} for way in engines}
    for repeat in range(repeats + 1):
        for way, engine in engines.items():
            spent, log_probs = _timed(functools.partial(engine.compute_log_probs, batch, limit=case.limit))
            results[way].setdefault("log_probs", log_probs)
            update = functools.partial(engine.update, batch, mean_log_prob(batch), limit=case.limit, with_entropy=True)
            spent_update, metrics = _timed(update)
            results[way].setdefault("loss", metrics["loss"])
            if repeat > 0:
                results[way]["log_prob_ms"].append(spent)
                results[way]["update_ms"].append(spent_update)
    for way, engine in engines.items():
        results[way]["tokens"] = sum(item.inputs.tokens.numel() for item in engine._micro_batches(batch, case.limit))
    return results


def _engine(case: Case, model: str, *, packed: bool) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind="actor",
            model_path=model,
            spec=load_spec(model),
            layout=ParallelLayout(world_size=case.world_size, tp=case.tp, pp=case.pp),
            optimizer=OptimizerSettings(lr=1e-6),
            packed=packed,
        )
    )


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def rows_of(case: Case, results: dict[str, dict[str, Any]]) -> list[Row]:
    """One row per pass, after checking that both ways computed the same."""
    padded, packed = results["padded"], results["packed"]
    torch.testing.assert_close(packed["log_probs"], padded["log_probs"], atol=2e-5, rtol=0)
    torch.testing.assert_close(packed["loss"], padded["loss"], atol=1e-5, rtol=0)
    share = packed["tokens"] / padded["tokens"]
    rows = [
        Row(
            case=case.name,
            metric="tokens computed",
            value=packed["tokens"],
            unit="tokens",
            peers={"padded": padded["tokens"]},
        )
    ]
    for metric in ("log_prob_ms", "update_ms"):
        value, peer = (statistics.median(each[metric]) for each in (packed, padded))
        bound = peer * share
        rows.append(
            Row(
                case=case.name,
                metric=metric,
                value=value,
                unit="ms",
                limit=bound,
                ratio=bound / value,
                peers={"padded": peer},
            )
        )
    return rows


def main() -> None:
    """Measure all cases, print them and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            model = save_model(Path(folder) / str(number), case.hidden, case.longest)

            def rank_main(env: RankEnvironment, case: Case = case, model: str = model) -> Any:
                torch.set_num_threads(1)
                init_process_group(env, backend="gloo", timeout=timedelta(seconds=300))
                results = measure(case, model, arguments.repeats)
                return rows_of(case, results) if env.rank == 0 else None

            rows += run_ranks(rank_main, case.world_size, timeout_s=600)[0]
            print(*rows[-3:], sep="\n", flush=True)
    if arguments.output:
        write(arguments.output, "packing", rows, {"torch": torch.__version__, "megatron-core": "0.19.2"})


if __name__ == "__main__":
    main()
