"""How close a reshard comes to the speed of memory and links, beside the usual way: gather, send handles, load.

    python tools/bench_reshard.py --output docs/benchmarks/reshard_h100x2.json
    python tools/bench_reshard.py --train tp=2 --rollout tp=1 --output /tmp/one_pair.json
    python tools/bench_reshard.py --engine --output docs/benchmarks/reshard_h100x1.json

Every GPU has one trainer process and one engine process, with a 7B-shaped model in the layouts of Megatron and SGLang
and no other part of them; --engine measures the whole update of a real SGLang engine on one GPU instead. Each layout
pair is checked bit by bit on a small model before it is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import reshard_peers
import reshard_sides
import torch
from benchmark_file import Row, installed, timed_row, write
from gpu_workers import Worker, run_all
from plan_shapes import qwen2_7b, qwen3_moe_30b

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.plan import PlanStats
from mrl.reshard.spec import ModelSpec

_BLOCK_BYTES = 8 << 30
_PEER_WAYS = {"per_tensor_ipc_ms": False, "flattened_buckets_ms": True}
"""Metric, and whether tensors are flattened into buckets."""


@dataclass(kw_only=True, frozen=True)
class Pair:
    """A training layout and the engines'."""

    train: ParallelLayout
    rollout_tp: int
    num_gpus: int
    rollout_ep: int = 1

    @property
    def has_experts(self) -> bool:
        """Whether a mixture of experts is meant."""
        return self.train.ep > 1 or self.rollout_ep > 1

    def __str__(self) -> str:
        engines = self.num_gpus // self.rollout_tp
        train = f"{self.train} x EP{self.train.ep}" if self.train.ep > 1 else str(self.train)
        rollout = f"TP{self.rollout_tp} x EP{self.rollout_ep}" if self.rollout_ep > 1 else f"TP{self.rollout_tp}"
        return f"{train} -> {f'{engines} x ' if engines > 1 else ''}{rollout}"


@dataclass(kw_only=True, frozen=True)
class Rates:
    """What cudaMemcpyAsync reaches one way, in GB/s."""

    local: float
    peer: float | None

    def least_ms(self, stats: PlanStats) -> float:
        """Memory and links work at the same time: the slower of the two decides."""
        remote = stats.bytes - stats.local_bytes
        return max(stats.local_bytes / self.local, remote / self.peer if self.peer else 0.0) / 1e6


@dataclass(kw_only=True, frozen=True)
class Machine:
    """The processes of a benchmark, by GPU."""

    trainers: list[Worker]
    engines: list[Worker]

    def release(self) -> None:
        """Free the GPUs' memory, the readers' mappings first."""
        run_all(self.engines, reshard_sides.release)
        run_all(self.trainers, reshard_sides.release)


@contextmanager
def machine(num_gpus: int, num_trainers: int) -> Iterator[Machine]:
    """One engine process for each GPU and the trainer processes, spread over the GPUs."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_gpus)
    links = [context.Pipe() for _ in range(num_trainers)]
    trainers = [Worker(rank % num_gpus, {"link": near}) for rank, (near, _) in enumerate(links)]
    engines = [Worker(gpu, {"link": links[gpu][1], "barrier": barrier}) for gpu in range(num_gpus)]
    try:
        run_all(engines, reshard_sides.warm_up)
        if num_gpus > 1:
            shared = {"world_size": num_gpus, "port": _free_port()}
            run_all(trainers[:num_gpus], reshard_peers.join_group, [{**shared, "rank": gpu} for gpu in range(num_gpus)])
        yield Machine(trainers=trainers, engines=engines)
        if num_gpus > 1:
            run_all(trainers[:num_gpus], reshard_peers.leave_group)
    finally:
        for worker in [*engines, *trainers]:
            worker.close()


def measure_rates(run: Machine, repeats: int) -> tuple[Rates, list[Row]]:
    """Copies of one large block of a trainer process into every GPU at once: from its own memory, and from a peer's."""
    gpus = range(len(run.engines))
    holders = run.trainers[: len(gpus)]
    blocks = run_all(holders, reshard_sides.hold_block, [{"num_bytes": _BLOCK_BYTES}] * len(gpus))
    wanted = [{"blocks": [blocks[gpu], blocks[gpu - 1] if len(gpus) > 1 else None], "repeats": repeats} for gpu in gpus]
    local, peer = zip(*run_all(run.engines, reshard_sides.copy_rates, wanted), strict=True)
    run.release()
    rates = Rates(local=max(local), peer=max(peer) if len(gpus) > 1 else None)
    case = f"one block of {_BLOCK_BYTES >> 30} GiB"
    rows = [Row(case=case, metric="local_copy", value=rates.local, unit="GB/s")]
    rows += [Row(case=case, metric="peer_copy", value=rates.peer, unit="GB/s")] if rates.peer else []
    return rates, rows


def check(run: Machine, spec: ModelSpec, pair: Pair, *, with_peers: bool) -> None:
    """Raise unless a pull, and the ways it is compared with, bring every byte on a small model."""
    _set_up(run, spec, pair, known_values=True)
    ways: list[tuple[str, bool | None]] = [("pull", None), *(_PEER_WAYS.items() if with_peers else ())]
    for name, flat in ways:
        run_all(run.engines, reshard_sides.poison)
        if flat is None:
            run_all(run.engines, reshard_sides.time_pulls, [{"repeats": 0}] * len(run.engines))
        else:
            _load_gathered(run, flat)
        wrong = [param for found in run_all(run.engines, reshard_sides.differing) for param in found]
        if wrong:
            raise RuntimeError(f"{pair}, {name}: {len(wrong)} parameters differ, first {wrong[0]}")
    run.release()


def measure(
    run: Machine, spec: ModelSpec, pair: Pair, rates: Rates, *, repeats: int, with_peers: bool
) -> Iterator[Row]:
    """Copy, whole pull and, if wanted, the ways it is compared with; of the slowest engine rank."""
    stats = _set_up(run, spec, pair, known_values=False)
    times = run_all(run.engines, reshard_sides.time_pulls, [{"repeats": repeats}] * len(stats))
    slowest = [[max(values) for values in zip(*ranks, strict=True)] for ranks in zip(*times, strict=True)]
    copy, pull = (statistics.median(round_[at] for round_ in slowest) for at in (0, 1))
    peers = {}
    if with_peers:
        for name, flat in _PEER_WAYS.items():
            rounds = [_load_gathered(run, flat) for _ in range(4)]
            peers[name] = statistics.median(rounds[1:]) * 1e3
    run.release()
    limit = max(rates.least_ms(each) for each in stats)
    case = str(pair)
    yield timed_row(case, "copy_ms", copy, limit)
    yield timed_row(case, "pull_ms", pull, limit, **peers)
    if peers:
        yield Row(case=case, metric="faster_than_best_peer", value=min(peers.values()) / pull, unit="x")
    for metric, number in (
        ("local", max(each.local_bytes for each in stats)),
        ("remote", max(each.bytes - each.local_bytes for each in stats)),
    ):
        yield Row(case=case, metric=f"{metric}_per_rank", value=number / 1e9, unit="GB")


def _set_up(run: Machine, spec: ModelSpec, pair: Pair, *, known_values: bool) -> list[PlanStats]:
    shared = {"spec": spec, "layout": pair.train, "known_values": known_values}
    trainers = run.trainers[: pair.train.world_size]
    sources = run_all(trainers, reshard_sides.hold, [{**shared, "rank": rank} for rank in range(len(trainers))])
    tp = pair.rollout_tp
    common = {"spec": spec, "sources": sources, "tp_size": tp, "ep_size": pair.rollout_ep}
    wanted = [{**common, "tp_rank": gpu % tp} for gpu in range(len(run.engines))]
    return run_all(run.engines, reshard_sides.bind, wanted)


def _load_gathered(run: Machine, flat: bool) -> float:
    for engine in run.engines:
        engine.start(reshard_peers.receive)
    seconds = run_all(run.trainers[: len(run.engines)], reshard_peers.send, [{"flat": flat}] * len(run.engines))
    for engine in run.engines:
        engine.result()
    return max(seconds)


def small_like(spec: ModelSpec) -> ModelSpec:
    """The same family with small, uneven sizes and a padded vocabulary, for the bitwise check."""
    return replace(
        spec,
        vocab_size=1000,
        hidden_size=264,
        intermediate_size=712,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=32,
        moe=spec.moe and replace(spec.moe, num_experts=8),
    )


def default_pairs(num_gpus: int) -> list[Pair]:
    """TP1 and TP2 into TP1 on one GPU; on more, the pairs of one rank for each of two GPUs."""
    if num_gpus == 1:
        return [_pair("", "tp=1", 1), _pair("tp=2", "tp=1", 1)]
    layouts = [("tp=2", "tp=2"), ("pp=2", "tp=2"), ("tp=2", "tp=1"), ("", "tp=2"), ("pp=2,vpp=2", "tp=1")]
    layouts += [("ep=2", "tp=2"), ("ep=2", "tp=2,ep=2")]
    return [_pair(train, rollout, 2) for train, rollout in layouts]


def _pair(train: str, rollout: str, num_gpus: int) -> Pair:
    trained, served = _sizes(train), _sizes(rollout)
    product = trained.get("tp", 1) * trained.get("pp", 1)
    layout = ParallelLayout(world_size=max(num_gpus, product), **trained)
    return Pair(train=layout, rollout_tp=served["tp"], rollout_ep=served.get("ep", 1), num_gpus=num_gpus)


def _sizes(text: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (item.partition("=") for item in text.split(",") if item)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _versions() -> dict[str, str]:
    return {"cuda": str(torch.version.cuda), **installed(("torch", "sglang"))}


def _run_pairs(arguments: argparse.Namespace, dense: ModelSpec) -> Iterator[Row]:
    num_gpus = torch.cuda.device_count()
    one = arguments.rollout and [_pair(arguments.train, arguments.rollout, num_gpus)]
    pairs: Sequence[Pair] = one or default_pairs(num_gpus)
    num_gpus = pairs[0].num_gpus
    with machine(num_gpus, max(pair.train.world_size for pair in pairs)) as run:
        rates, rows = measure_rates(run, arguments.repeats)
        yield from rows
        for pair in pairs:
            spec = qwen3_moe_30b(arguments.layers) if pair.has_experts else dense
            # The other ways' gathers are written for dense models, with one trainer rank on each GPU.
            with_peers = num_gpus > 1 and pair.train.world_size == num_gpus and not pair.has_experts
            check(run, small_like(spec), pair, with_peers=with_peers)
            yield from measure(run, spec, pair, rates, repeats=arguments.repeats, with_peers=with_peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", default="", help="training layout of a single pair: tp, pp, vpp, ep, as tp=2,pp=2")
    parser.add_argument("--rollout", default="", help="engine layout of a single pair: tp=2 or tp=2,ep=2")
    parser.add_argument("--engine", action="store_true", help="also time the whole update of a real SGLang engine")
    parser.add_argument("--layers", type=int, default=28, help="28 is the whole dense model, 15.2 GB")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    spec = qwen2_7b(arguments.layers)
    rows: list[Row] = []
    for row in _run_pairs(arguments, spec):
        print(row, flush=True)
        rows.append(row)
        # Written after each row: a run that is cut off leaves what it has measured.
        write(arguments.output, "reshard", rows, _versions())
    if arguments.engine:
        from reshard_engine import measure_engine

        rows += measure_engine(spec, rows[0].value, arguments.repeats)
        write(arguments.output, "reshard", rows, _versions())


if __name__ == "__main__":
    main()
