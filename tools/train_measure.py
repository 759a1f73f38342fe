"""How a call of a training engine is timed and reported: repeats, tokens/s, model FLOP/s, peak memory."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from bench_model import flops_per_token
from benchmark_file import Row

from mrl.reshard.spec import ModelSpec
from mrl.types import MicroBatchLimit, TrainBatch

PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 SXM, as its data sheet says."""
MEMORY_LIMIT_GIB = 45.0
GIB = 2**30

Report = Callable[[list[Row]], None]


@dataclass(kw_only=True, frozen=True)
class Job:
    """What all cases share."""

    model: str
    spec: ModelSpec
    device: torch.device
    dtype: Literal["bfloat16", "float32"]
    batches: tuple[tuple[int, int], ...]
    """Samples and tokens of each; the first is the main one."""
    repeats: int
    report: Report
    """Takes finished rows; called on every rank."""
    only: str = ""
    """Words separated by commas: run the parts whose name holds one of them, besides the ceiling."""

    @property
    def tokens(self) -> int:
        """Of one data-parallel rank's batch."""
        samples, length = self.batches[0]
        return samples * length


@dataclass(frozen=True)
class Speed:
    """One case: median seconds, and peak memory of the timed calls."""

    seconds: float
    peak_gib: float


@dataclass
class Ceiling:
    """What bare megatron-core reached, tokens/s by batch; empty until measured."""

    train: dict[tuple[int, int], float] = field(default_factory=dict)
    forward: dict[tuple[int, int], float] = field(default_factory=dict)
    peak_gib: dict[tuple[int, int], float] = field(default_factory=dict)


def measure(call: Callable[[], Any], job: Job) -> Speed:
    """Median time of the repeats after two calls that do not count; starts and ends with an idle device."""
    for _ in range(2):
        call()
    _synchronize(job.device)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(job.repeats):
        start = time.perf_counter()
        call()
        _synchronize(job.device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if job.device.type == "cuda" else 0.0
    return Speed(statistics.median(seconds), peak)


@dataclass(frozen=True)
class Case:
    """Measurements on one batch, against the ceiling of that batch."""

    job: Job
    shape: tuple[int, int]
    """Samples and tokens of each."""
    ceiling: Ceiling = field(default_factory=Ceiling)

    @property
    def name(self) -> str:
        """As in "16 x 1,024"."""
        return f"{self.shape[0]} x {self.shape[1]:,}"

    def batch(self, times: int = 1) -> TrainBatch:
        """Samples of equal length, the second half of each a response; always the same."""
        return _random_batch(self.job.spec, self.shape[0] * times, self.shape[1])

    def limit(self, pieces: int = 1) -> MicroBatchLimit:
        """Under which one rank's batch runs in so many micro-batches."""
        return MicroBatchLimit(tokens=self.job.tokens // pieces)

    def report(self, name: str, call: Callable[[], Any], *, passes: int = 3, head: bool = True) -> Speed | None:
        """Measure and report; an error is printed, and None returned.

        Args:
            passes: forward passes' worth of arithmetic: 3 in a training step, whatever is computed twice.
            head: whether there is an output layer over the vocabulary.
        """
        case = f"{name}, {self.name}"
        try:
            speed = measure(call, self.job)
        except Exception:
            print(f"{case} failed:\n{traceback.format_exc()}", flush=True)
            torch.cuda.empty_cache()
            return None
        ceilings = self.ceiling.forward if passes == 1 else self.ceiling.train
        tokens_per_s, bound = self.job.tokens / speed.seconds, ceilings.get(self.shape)
        ratio = tokens_per_s / bound if bound else None
        rows = [
            Row(case=case, metric="tokens_per_s", value=tokens_per_s, unit="tokens/s", limit=bound, ratio=ratio),
            *self._flops_rows(case, tokens_per_s, passes=passes, head=head),
            *memory_rows(case, speed, self._bare_peak() if passes == 3 else {}),
        ]
        self.job.report(rows)
        return speed

    def _flops_rows(self, case: str, tokens_per_s: float, *, passes: int, head: bool) -> list[Row]:
        if self.job.device.type != "cuda":
            return []
        spec = self.job.spec
        flops = flops_per_token(spec, self.shape[1]) - (0 if head else 2.0 * spec.vocab_size * spec.hidden_size)
        value = passes * flops * tokens_per_s / 1e12
        ratio = value / PEAK_TFLOPS
        return [Row(case=case, metric="model_tflops", value=value, unit="TFLOP/s", limit=PEAK_TFLOPS, ratio=ratio)]

    def _bare_peak(self) -> dict[str, float]:
        return {"bare": self.ceiling.peak_gib[self.shape]} if self.shape in self.ceiling.peak_gib else {}


def memory_rows(case: str, speed: Speed, peers: dict[str, float] | None = None) -> list[Row]:
    """Peak memory against the limit; nothing on CPU."""
    if not speed.peak_gib:
        return []
    ratio = MEMORY_LIMIT_GIB / speed.peak_gib
    return [
        Row(
            case=case,
            metric="peak_memory",
            value=speed.peak_gib,
            unit="GiB",
            limit=MEMORY_LIMIT_GIB,
            ratio=ratio,
            peers=peers or {},
        )
    ]


def _random_batch(spec: ModelSpec, samples: int, length: int) -> TrainBatch:
    """Samples of equal length, the second half of each a response."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, spec.vocab_size, (samples, length), generator=generator)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, length // 2 :] = True
    return TrainBatch(tokens=tokens, lengths=torch.full((samples,), length), loss_mask=loss_mask)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
