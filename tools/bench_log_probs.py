"""Time and memory of log-probs and entropy of a large vocabulary's logits, forward and backward, on one GPU.

    python tools/bench_log_probs.py --output docs/benchmarks/log_probs_h100x1.json

"fused" is what training uses on a GPU: the gradient overwrites the logits. The other ways are the same kernels with a
gradient of its own memory, the torch operations that stand in for them elsewhere, those over a float32 copy of the
logits as megatron's bfloat16 wrapper makes it by default, and plain log_softmax of such a copy. The bound is the bytes
that must move (the logits once forward, twice backward) at the rate of a device copy of the logits in the same run.
Values and gradients of a slice are checked against float64 first. `--sweep` times other cuts of the kernels, too.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from benchmark_file import Row, timed_row, write
from torch import Tensor

from mrl.ops import vocab_fused, vocab_reference, vocab_statistics
from mrl.ops.vocab_fused import Tuning
from mrl.parallel.vocab_parallel import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy

GIB = 1 << 30
Compute = Callable[[Tensor, Tensor, bool], tuple[Tensor, ...]]
"""Logits [1, N, V], targets [1, N], whether entropy is wanted -> log-probs and, if so, entropy; [1, N] each."""

STATISTICS_CUTS = [
    Tuning(block=block, num_warps=warps, num_stages=stages)
    for block, warps, stages in (
        *((2048, 4, 1), (4096, 4, 1), (4096, 8, 1), (8192, 8, 1), (8192, 16, 1)),
        *((4096, 8, 3), (8192, 8, 3)),
    )
]
GRADIENT_CUTS = [
    Tuning(block=block, num_warps=warps, num_blocks=blocks)
    for block, warps, blocks in (
        *((2048, 4, 1), (2048, 8, 1), (4096, 8, 1), (8192, 16, 1)),
        *((2048, 4, 8), (2048, 8, 8), (4096, 8, 8), (8192, 16, 8), (4096, 8, 64)),
    )
]


@dataclass(kw_only=True, frozen=True)
class Bench:
    """The logits, the weights of the results in a loss, and what a copy of the logits takes."""

    logits: Tensor
    targets: Tensor
    weights: tuple[Tensor, Tensor]
    copy_ms: float
    repeats: int

    def fill(self) -> None:
        """Draw the logits; passes that overwrite them leave others."""
        with torch.no_grad():
            self.logits.normal_(std=3)

    def passes(self, way: str, compute: Compute) -> Iterator[Row]:
        """Time and extra memory of both passes, without and with entropy."""
        for with_entropy in (False, True):
            suffix = "_with_entropy" if with_entropy else ""
            with torch.no_grad():
                forward = self._measure(lambda: compute(self.logits, self.targets, with_entropy))  # noqa: B023
            yield from _rows(way, f"forward{suffix}", forward, self.copy_ms / 2)
            backward = self._measure(
                lambda results: torch.autograd.grad(results, self.logits, self.weights[: len(results)]),
                prepare=lambda: compute(self.logits, self.targets, with_entropy),  # noqa: B023
            )
            yield from _rows(way, f"backward{suffix}", backward, self.copy_ms)

    def _measure(
        self, work: Callable[..., object], prepare: Callable[[], tuple[Tensor, ...]] | None = None
    ) -> tuple[float, float]:
        """Median ms of the work after one round to warm up, and GiB that it takes, its preparation included."""
        times = []
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(self.repeats + 1):
            self.fill()
            arguments = [prepare()] if prepare else []
            times.append(_timed(work, *arguments))
            del arguments
        return statistics.median(times[1:]), (torch.cuda.max_memory_allocated() - before) / GIB


def _timed(work: Callable[..., object], *arguments: object) -> float:
    """Milliseconds on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _rows(way: str, name: str, measured: tuple[float, float], limit_ms: float) -> Iterator[Row]:
    yield timed_row(way, f"{name}_ms", measured[0], limit_ms)
    yield Row(case=way, metric=f"{name}_extra_gib", value=measured[1], unit="GiB")


def parallel(inplace: bool) -> Compute:
    """The project's own functions, for one rank that holds the whole vocabulary."""

    def compute(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
        options = {"tp_group": None, "vocab_size": logits.shape[-1], "inplace_backward": inplace}
        if with_entropy:
            return vocab_parallel_log_probs_and_entropy(logits, targets, **options)
        return (vocab_parallel_log_probs(logits, targets, **options),)

    return compute


def of_float32_copy(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """The project's functions over what megatron's bfloat16 wrapper returns by default."""
    return parallel(inplace=False)(logits.float(), targets, with_entropy)


def plain(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """What one would write first."""
    log_softmax = logits.float().log_softmax(-1)
    log_probs = log_softmax.gather(-1, targets[..., None])[..., 0]
    return (log_probs, -(log_softmax.exp() * log_softmax).sum(-1)) if with_entropy else (log_probs,)


@contextmanager
def torch_operations() -> Iterator[None]:
    """The stand-ins for the kernels on this GPU."""
    with mock.patch.object(vocab_statistics, "implementation", return_value=vocab_reference):
        yield


def check(logits: Tensor, targets: Tensor) -> None:
    """Raise unless the first tokens' values and gradients are those of float64."""
    logits, targets = logits[:, :64], targets[:, :64]
    results = []
    for dtype, inplace in ((torch.float64, False), (logits.dtype, False), (logits.dtype, True)):
        leaf = logits.detach().to(dtype, copy=True).requires_grad_()
        outputs = parallel(inplace)(leaf, targets, True)
        (gradient,) = torch.autograd.grad(sum(outputs).sum(), leaf)
        results.append((*(each.detach().double() for each in outputs), gradient.double()))
    for values in results[1:]:
        for actual, expected, rtol in zip(values, results[0], (0.0, 0.0, 2**-8), strict=True):
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-5)
    print("values and gradients of 64 tokens are those of float64", flush=True)


def sweep(bench: Bench) -> Iterator[Row]:
    """The kernels alone, with other cuts."""
    logits, local = bench.logits.detach(), bench.targets
    options = {"count": logits.shape[-1], "temperature": 1.0}
    peak, sums = vocab_fused.statistics(logits, local, **options, with_entropy=True)
    terms = (peak, sums[0].log(), bench.weights[0], (bench.weights[1], sums[1]))
    for cut in STATISTICS_CUTS:
        run = lambda: vocab_fused.statistics(logits, local, **options, with_entropy=True, tuning=cut)  # noqa: B023, E731
        yield timed_row("sweep, forward", _name(cut), _best(run), bench.copy_ms / 2)
    for cut in GRADIENT_CUTS:
        run = lambda: vocab_fused.gradient(logits, local, *terms, **options, inplace=True, tuning=cut)  # noqa: B023, E731
        yield timed_row("sweep, backward", _name(cut), _best(run), bench.copy_ms)


def _name(cut: Tuning) -> str:
    return f"{cut.block}/{cut.num_warps}w/{cut.num_stages}s/{cut.num_blocks}b"


def _best(run: Callable[[], object]) -> float:
    run()
    return min(_timed(run) for _ in range(3))


def make_bench(num_tokens: int, vocab_size: int, repeats: int) -> tuple[Bench, Row]:
    """Random logits and the time of copying them, with its row."""
    torch.manual_seed(0)
    logits = torch.empty(1, num_tokens, vocab_size, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(logits.normal_())
    copy_ms = statistics.median(_timed(target.copy_, logits) for _ in range(repeats + 2))
    del target
    torch.cuda.empty_cache()
    rate = 2 * logits.nbytes / copy_ms / 1e6
    weights = tuple(torch.randn(1, num_tokens, device="cuda") for _ in range(2))
    targets = torch.randint(0, vocab_size, (1, num_tokens), device="cuda")
    bench = Bench(logits=logits, targets=targets, weights=weights, copy_ms=copy_ms, repeats=repeats)
    bench.fill()
    return bench, Row(case="device copy of the logits", metric="read and written", value=rate, unit="GB/s")


def parts(bench: Bench, with_sweep: bool) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """The ways to measure, the most important first."""
    yield "fused", lambda: bench.passes("fused", parallel(inplace=True))
    yield "fused, gradient apart", lambda: bench.passes("fused, gradient apart", parallel(inplace=False))
    if with_sweep:
        yield "sweep", lambda: sweep(bench)
    with torch_operations():
        yield "torch", lambda: bench.passes("torch operations", parallel(inplace=False))
        yield "float32", lambda: bench.passes("torch, float32 copy", of_float32_copy)
    yield "plain", lambda: bench.passes("plain log_softmax", plain)


def main() -> None:
    """Measure everything, print it, and write it after every row; a way that fails is printed and left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also time other cuts of the kernels; not written")
    arguments = parser.parse_args()
    bench, copy_row = make_bench(arguments.tokens, arguments.vocab_size, arguments.repeats)
    assert vocab_statistics.implementation(bench.logits) is vocab_fused
    check(bench.logits, bench.targets)
    bench.logits.requires_grad_()
    rows = [copy_row]
    print(copy_row, flush=True)
    for name, measure in parts(bench, arguments.sweep):
        try:
            for row in measure():
                print(row, flush=True)
                rows += [row] if name != "sweep" else []
                write(arguments.output, "log_probs", rows, {"torch": torch.__version__, "triton": triton.__version__})
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
