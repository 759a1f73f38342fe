"""Time and memory of planning a reshard in jobs of any size, and predicted against measured times.

One engine rank's own plan is what a job waits for; `mrl plan` makes a few of them. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmark_file import Row, write

from mrl.parallel.layout import ParallelLayout
from mrl.scale.job import Job
from mrl.scale.shapes import load_shape
from mrl.scale.times import Rates, predict_reshard
from mrl.scale.traffic import plan_traffic

LIMIT_S = 10.0
LIMIT_GIB = 2.0
MEASURED = Path(__file__).parents[1] / "docs/benchmarks"


@dataclass(kw_only=True, frozen=True)
class Case:
    """A job to plan for."""

    model: str
    layout: ParallelLayout
    rollout_tp: int
    rollout_ep: int = 1

    def __str__(self) -> str:
        engine = f"TP{self.rollout_tp}" + (f" x EP{self.rollout_ep}" if self.rollout_ep > 1 else "")
        return f"{self.model}, {self.layout.world_size} GPUs, {self.layout} -> {engine}"

    def job(self) -> Job:
        return Job(
            spec=load_shape(self.model),
            layout=self.layout,
            rollout_tp=self.rollout_tp,
            rollout_ep=self.rollout_ep,
            num_engines=self.layout.world_size // self.rollout_tp,
            gpus_per_host=8,
            dtype=torch.bfloat16,
        )


CASES = (
    Case(model="Qwen2.5-7B", layout=ParallelLayout(world_size=8, tp=2, pp=2), rollout_tp=2),
    Case(model="Llama-3.1-70B", layout=ParallelLayout(world_size=1024, tp=8, pp=4), rollout_tp=8),
    Case(model="Llama-3.1-70B", layout=ParallelLayout(world_size=4096, tp=8, pp=4), rollout_tp=8),
    Case(model="Llama-3.1-405B", layout=ParallelLayout(world_size=4032, tp=8, pp=7), rollout_tp=16),
    Case(
        model="Qwen3-235B-A22B",
        layout=ParallelLayout(world_size=1024, tp=4, pp=2, ep=64, sequence_parallel=True),
        rollout_tp=16,
        rollout_ep=16,
    ),
)
# Case of the measured file: layout and engine size. Two engine ranks share two GPUs of one host.
PAIRS = {
    "TP1 x PP1 x DP1 -> TP1": (ParallelLayout(world_size=1), 1),
    "TP2 x PP1 x DP1 -> TP2": (ParallelLayout(world_size=2, tp=2), 2),
    "TP1 x PP1 x DP2 -> TP2": (ParallelLayout(world_size=2), 2),
    "TP1 x PP2 x DP1 -> TP2": (ParallelLayout(world_size=2, pp=2), 2),
    "TP2 x PP1 x DP1 -> 2 x TP1": (ParallelLayout(world_size=2, tp=2), 1),
    "TP1 x PP2 x VPP2 x DP1 -> 2 x TP1": (ParallelLayout(world_size=2, pp=2, vpp=2), 1),
}


def main() -> None:
    """Measure every case in a process of its own, compare with the measured files and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MEASURED / "plan_cpu2.json")
    arguments = parser.parse_args()
    rows = [row for case in CASES for row in measure(case)]
    rows += compare_with_measured()
    for row in rows:
        print(row)
    write(arguments.output, "plan", rows, {"torch": torch.__version__})


def measure(case: Case) -> list[Row]:
    """Time and peak memory of one rank's plan, beside what it takes to make up all ranks' exports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        seconds, gib, baseline_gib = process.submit(plan_one_rank, case).result()
    return [
        Row(case=str(case), metric="plan_one_rank", value=seconds, unit="s", limit=LIMIT_S, ratio=LIMIT_S / seconds),
        Row(case=str(case), metric="peak_memory", value=gib, unit="GiB", limit=LIMIT_GIB, ratio=LIMIT_GIB / gib),
        Row(case=str(case), metric="memory_of_imports", value=baseline_gib, unit="GiB"),
    ]


def plan_one_rank(case: Case) -> tuple[float, float, float]:
    """(seconds, GiB at the peak, GiB before), in a fresh process; the exports of all ranks are counted in."""
    before, start = peak_gib(), time.process_time()
    plan_traffic(case.job(), most_groups=1)
    return time.process_time() - start, peak_gib(), before


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare_with_measured() -> Iterator[Row]:
    """Predicted times of the benchmarked layouts, each at its file's rates; the limit is what was measured."""
    for name in ("reshard_h100x1.json", "reshard_h100x2.json"):
        found = {
            (row["case"], row["metric"]): row["value"] for row in json.loads((MEASURED / name).read_text())["rows"]
        }
        local = found["one block of 8 GiB", "local_copy"]
        rates = Rates(device_copy=local, nvlink=found.get(("one block of 8 GiB", "peer_copy"), local))
        for case, (layout, rollout_tp) in PAIRS.items():
            if (case, "pull_ms") in found:
                yield from compare(case, layout, rollout_tp, rates, found)


def compare(
    case: str, layout: ParallelLayout, rollout_tp: int, rates: Rates, found: dict[tuple[str, str], float]
) -> Iterator[Row]:
    """Copy and whole pull of one pair."""
    planned = Case(model="Qwen2.5-7B", layout=layout, rollout_tp=rollout_tp)
    predicted = predict_reshard(plan_traffic(planned.job()), rates)
    for metric, seconds in (("copy_ms", predicted.copy_s), ("pull_ms", predicted.total_s)):
        measured = found[case, metric]
        yield Row(
            case=case,
            metric=f"predicted_{metric}",
            value=seconds * 1e3,
            unit="ms",
            limit=measured,
            ratio=seconds * 1e3 / measured,
        )


if __name__ == "__main__":
    main()
