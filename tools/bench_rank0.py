"""What every rank computes on its CPU in a step besides the models, on simulated samples: each function timed alone.

No model and no engine runs; what they return is drawn at random. Every rank holds the whole batch, so that these are
rank 0's seconds in a job of any size; what ranks share out among themselves counts with the share of one. The median
of several rounds, in seconds of a clock on the wall, in which other work on the same cores shows, and as `cpu` in CPU
seconds of all threads.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from benchmark_file import Row, write
from torch import Tensor

from mrl.algorithms.estimators.gae import GAE
from mrl.algorithms.kl import FixedKLController
from mrl.launch.cores import keep_freed_memory
from mrl.parallel.microbatches import PlanRules, plan_micro_batches
from mrl.rollout.batch import build_batch
from mrl.rollout.queue import SharedQueue
from mrl.rollout.wire import decode
from mrl.trainer.advantages import AdvantageStage
from mrl.trainer.correction import CorrectionStage
from mrl.trainer.samples import summarize_samples
from mrl.trainer.updates import UpdateSchedule, iterate_mini_batches
from mrl.types import MicroBatchLimit, Prompt, Sample, TrainBatch

LIMIT_S = 2.0
_PER_PROMPT = 8
_LEADERS = 64
_DP_SIZE = 128
_VOCABULARY = 150_000


class Clock:
    """Seconds by function, over several rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's seconds towards `name`."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.seconds[name].append(time.perf_counter() - start)
        self.cpu_seconds[name].append(time.process_time() - cpu_start)

    def rows(self, case: str) -> list[Row]:
        """A row for each function, then their sum against the limit."""
        rows = [
            Row(
                case=case,
                metric=name,
                value=seconds,
                unit="s",
                peers={"cpu": statistics.median(self.cpu_seconds[name])},
            )
            for name, seconds in ((name, statistics.median(seconds)) for name, seconds in self.seconds.items())
        ]
        total, cpu = sum(row.value for row in rows), sum(row.peers["cpu"] for row in rows)
        ratio = LIMIT_S / total
        return [
            *rows,
            Row(case=case, metric="total", value=total, unit="s", limit=LIMIT_S, ratio=ratio, peers={"cpu": cpu}),
        ]


def main() -> None:
    """Run the rounds and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=4096, help="of each sample, an eighth of them the prompt's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="of a rank's tensor work, one after another"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/rank0_cpu2.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompts, messages = simulate(arguments.samples, arguments.tokens)
    rows: list[Row] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        clock = Clock()
        for number in range(arguments.rounds):
            run_step(prompts, messages, clock, step=number)
        rows += clock.rows(f"{arguments.samples} x {arguments.tokens} tokens, {threads} threads")
        print(*rows[-len(clock.seconds) - 1 :], sep="\n")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows.append(
        Row(case=f"{arguments.samples} x {arguments.tokens} tokens", metric="peak_memory", value=peak_gib, unit="GiB")
    )
    print(rows[-1])
    write(arguments.output, "rank0", rows, {"torch": torch.__version__, "cpu": describe_cpu()})


def describe_cpu() -> str:
    """Model and number of the cores that this process may use."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} x {model[1] if model else 'unknown'}"


def simulate(num_samples: int, num_tokens: int) -> tuple[list[Prompt], list[tuple[Tensor, Tensor]]]:
    """Prompts, and what every engine's leader would send of their responses."""
    prompt_tokens, share = num_tokens // 8, num_samples // _LEADERS
    prompts = [
        Prompt(
            uid=str(number),
            token_ids=torch.randint(_VOCABULARY, (prompt_tokens,)).tolist(),
            messages=[],
            data_source="task",
        )
        for number in range(num_samples // _PER_PROMPT)
    ]
    messages = []
    for leader in range(_LEADERS):
        index = torch.arange(leader * share, (leader + 1) * share)
        length = torch.full_like(index, num_tokens - prompt_tokens)
        header = torch.stack([index, length, torch.zeros_like(index), torch.ones_like(index)], 1).int().flatten()
        total = int(length.sum())
        tokens = torch.randint(_VOCABULARY, (total,), dtype=torch.int32)
        messages.append((torch.cat([header, tokens]), -torch.rand(total)))
    return prompts, messages


def run_step(prompts: list[Prompt], messages: list[tuple[Tensor, Tensor]], clock: Clock, *, step: int) -> None:
    """One step's work, in the order of the loop."""
    num_samples = len(prompts) * _PER_PROMPT
    with clock("dispatch"):
        queue = SharedQueue(torch.distributed.HashStore(), f"step {step}", num_samples)
        while queue.take(4):
            pass
    with clock("gather"):
        generations = {}
        for message in messages:
            generations |= decode(*message)
        samples = [
            Sample(prompt=prompts[index // _PER_PROMPT], generation=generation, reward=float(index % 2))
            for index, generation in sorted(generations.items())
        ]
    with clock("sample_metrics"):
        summarize_samples(samples)
    with clock("build_batch"):
        batch = build_batch(samples, pad_token_id=0)
    batch = add_model_outputs(batch)
    with clock("correction"):
        batch, _ = CorrectionStage().compute(batch)
    stage = AdvantageStage(
        estimator=GAE(gamma=1.0, lam=0.95),
        kl_penalty="kl",
        kl_controller=FixedKLController(0.01),
        n_samples_per_prompt=_PER_PROMPT,
    )
    with clock("advantages"):
        batch, _ = stage.compute(batch, samples)
    divide(batch, clock, step=step)


def add_model_outputs(batch: TrainBatch) -> TrainBatch:
    """The batch with log-probs and values as three models might compute them."""
    log_probs = batch.required("rollout_log_probs")
    noise = torch.randn(log_probs.shape[1]) * 0.01
    return batch.with_fields(
        old_log_probs=log_probs + noise, ref_log_probs=log_probs - noise, values=torch.randn(log_probs.shape)
    )


def divide(batch: TrainBatch, clock: Clock, *, step: int) -> None:
    """Mini-batches, and the micro-batches of all passes of an actor and of a critic."""
    limit = MicroBatchLimit(tokens=4 * batch.tokens.shape[1])
    schedule = UpdateSchedule(
        mini_batch_size=len(batch) // 4, update_limit=limit, forward_limit=limit, epochs=1, shuffle=False, seed=1
    )
    rules = PlanRules(dp_size=_DP_SIZE, packed=True, crossover=20_000)
    with clock("mini_batches"):
        parts = list(iterate_mini_batches(batch, schedule, step=step))
    # Lengths that differ take longer to deal out than the batch's own, which are equal.
    drawn = torch.randint(batch.tokens.shape[1] // 8, batch.tokens.shape[1] + 1, (len(batch),)).tolist()
    with clock("micro_batches"):
        for count in (len(batch), len(batch), *(len(part) for part in (*parts, *parts))):
            plan_micro_batches(drawn[:count], limit=limit, rules=rules, dp_rank=0)


if __name__ == "__main__":
    main()
