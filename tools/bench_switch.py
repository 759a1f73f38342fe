"""How long the devices take to change hands, stage by stage, and whether memory and weights survive many times of it.

    python tools/bench_switch.py --output docs/benchmarks/switch_h100x1.json
    python tools/bench_switch.py --smoke --output /tmp/switch_cpu.json

An actor and a critic with Adam, shaped like Qwen2-1.5B, train on one GPU in turn with a real SGLang engine, through
`PhaseSwitch`. The pinned copy rate of the same host, measured in the same run, bounds the optimizer's way. --smoke runs
all of it but the copies on CPU, with a tiny model. A part that fails prints its traceback, and the others go on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from bench_model import QWEN2_1_5B, TINY
from benchmark_file import Row, installed, write
from switch_parts import Job, Stages, check_weights, measure_copies, measure_optimizer, median_ms, start_job

from mrl.backends.megatron.preload import preload_megatron
from mrl.backends.sglang.preload import preload_sglang
from mrl.types import Prompt, SamplingParams

_GIB = 2**30
_PACKAGES = ("torch", "sglang", "megatron-core", "transformer-engine", "torch_memory_saver")
_WARM_UP = 2
_TARGET_MS = 150.0
_STAGES = (
    "release roles",
    "wait for the last copies",
    "return memory, gradients",
    "begin offload",
    "resume weights",
    "pull",
    "wait for copies",
    "return memory, optimizer",
    "resume kv_cache",
    "release engine",
    "begin onload",
)


_PARTS = ("to rollout", "to training", "wait for the last copies", "wait for copies")
_PROMPTS = [
    Prompt(uid=str(index), token_ids=[5 + index, 7, 11], messages=[], data_source="bench") for index in range(4)
]
_GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)


def main() -> None:
    """Measure, print a table, and write the rows after every part."""
    bench = Bench(_arguments())
    with tempfile.TemporaryDirectory() as folder:
        bench.run(Path(folder))


class Bench:
    """The parts of the benchmark and the rows they have made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._rows: list[Row] = []
        self._case = f"actor and critic, {(TINY if args.smoke else QWEN2_1_5B).name}"
        self._copy_rates: tuple[float, float] | None = None
        self._stages = Stages()
        self._begin = time.perf_counter()

    def run(self, folder: Path) -> None:
        """Everything, with a model in `folder`."""
        if self._args.smoke:
            # The engine is forked from here.
            preload_megatron()
            preload_sglang()
        with start_job(folder / "model", on_gpu=not self._args.smoke, stages=self._stages) as job:
            self._add("engine and roles", "start", self._elapsed(), "s")
            parts = (self._copies, self._switches, self._optimizer) if job.on_gpu else (self._switches,)
            for part in parts:
                self._attempt(part, job)
        self._add("all", "seconds", self._elapsed(), "s")
        self._save()

    def _attempt(self, part: Callable[[Job], None], job: Job) -> None:
        try:
            part(job)
        except Exception:
            traceback.print_exc()
        self._save()

    def _copies(self, job: Job) -> None:
        """The ceiling: one pinned block to the host and back."""
        out, back = self._copy_rates = measure_copies()
        self._add("1 GiB of pinned memory", "to_host", out, "GB/s")
        self._add("1 GiB of pinned memory", "to_device", back, "GB/s")

    def _switches(self, job: Job) -> None:
        """Timed switches with updates of both roles, then others, which show that nothing grows or is lost."""
        memory: list[int] = []
        checks = 0
        metrics: dict[str, float] = {}
        try:
            while len(memory) < self._args.switches and self._elapsed() < self._args.budget_s:
                in_use, metrics = self._switch(job, len(memory))
                memory.append(in_use)
                if len(memory) % 10 == 0:
                    job.rollout.generate(_PROMPTS, _GREEDY)
                    check_weights(job)
                    checks += 1
                with self._stages("to training"):
                    job.phases.to_training()
        finally:
            self._stages.end()
            self._stage_rows()
            self._memory_rows(memory, metrics, checks)

    def _switch(self, job: Job, number: int) -> tuple[int, dict[str, float]]:
        timed = _WARM_UP <= number < _WARM_UP + self._args.timed
        job.train(with_critic=timed or number < _WARM_UP or number % 10 == 0)
        self._stages.begin(keep=timed)
        with self._stages("to rollout"):
            metrics = job.phases.to_rollout()
        return job.memory_in_use(), metrics

    def _optimizer(self, job: Job) -> None:
        """One role's optimizer state alone, each way, against the ceiling."""
        assert self._copy_rates is not None, "the ceiling could not be measured"
        result = measure_optimizer(job.actor)
        case = f"actor's optimizer, {result.num_bytes / _GIB:.2f} GiB"
        ways = (("to_host", result.out_s), ("to_device", result.back_s))
        for (metric, seconds), limit in zip(ways, self._copy_rates, strict=True):
            rate = result.num_bytes / seconds / 1e9
            self._add(case, metric, rate, "GB/s", limit=limit)
        self._add(case, "begin_to_host", result.begin_out_s * 1e3, "ms")
        self._add(case, "begin_to_device", result.begin_back_s * 1e3, "ms")

    def _stage_rows(self) -> None:
        seconds = self._stages.seconds
        if not seconds:
            return
        for name in (*(stage for stage in _STAGES if stage in seconds), "to rollout", "to training"):
            self._add(self._case, name, median_ms(seconds[name]), "ms")
        parts = zip(*(seconds.get(name, [0.0] * len(seconds["pull"])) for name in _PARTS), strict=True)
        without = [there + back - sum(waits) for there, back, *waits in parts]
        value = median_ms(without)
        self._add(self._case, "both ways but copies", value, "ms", limit=_TARGET_MS, inverse=True)

    def _memory_rows(self, memory: list[int], metrics: dict[str, float], checks: int) -> None:
        case, settled = f"{len(memory)} switches", memory[_WARM_UP:]
        if settled:
            self._add(case, "in use after the first", settled[0] / _GIB, "GiB")
            self._add(case, "in use after the last", settled[-1] / _GIB, "GiB")
            self._add(case, "largest less smallest", (max(settled) - min(settled)) / _GIB, "GiB")
        self._add(case, "weights bitwise right", float(checks), "times")
        for name in sorted(name for name in metrics if name.startswith("memory/")):
            self._add("last switch", name, metrics[name], "GiB")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def _add(
        self, case: str, metric: str, value: float, unit: str, *, limit: float | None = None, inverse: bool = False
    ) -> None:
        ratio = None if limit is None else limit / value if inverse else value / limit
        self._rows.append(Row(case=case, metric=metric, value=value, unit=unit, limit=limit, ratio=ratio))
        print(self._rows[-1], flush=True)

    def _save(self) -> None:
        write(self._args.output, "switch", self._rows, installed(_PACKAGES))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--timed", type=int, default=9, help="switches that are timed, after two to warm up")
    parser.add_argument("--budget-s", type=float, default=120.0, help="begin no further switch after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="on CPU, with a tiny model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
