"""How close a reshard comes to the speed of memory and links, beside the usual way: gather, send handles, load.

    python tools/bench_reshard.py --output docs/benchmarks/reshard_h100x2.json
    python tools/bench_reshard.py --train tp=2 --rollout tp=1 --output /tmp/one_pair.json
    python tools/bench_reshard.py --engine --output docs/benchmarks/reshard_h100x1.json

Every GPU has one trainer process and one engine process, with a 7B-shaped model in the layouts of Megatron and SGLang
and no other part of them; --engine measures the whole update of a real SGLang engine on one GPU instead. Each layout
pair is checked bit by bit on a small model before it is timed, with the copy engines in every copy between devices and
without them; a bit that is flipped behind them must be found. --no-copy-engines times the pull without them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
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
from mrl.reshard.errors import ReshardError
from mrl.reshard.peer_reads import PIECE_BYTES
from mrl.reshard.peer_sums import check_peer_sums
from mrl.reshard.peers import COPY_ENGINE_BYTES
from mrl.reshard.plan import PlanStats
from mrl.reshard.routes import EnginePlaces
from mrl.reshard.spec import ModelSpec

_BLOCK_BYTES = 8 << 30
_EVERY_COPY = 1
_NO_COPY = 1 << 62
_SMALL_PIECE_BYTES = 4096
"""Cuts the copies of the small model, too."""
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
    for name, least in (("pull without copy engines", _NO_COPY), ("pull with copy engines", _EVERY_COPY)):
        stats = _set_up(run, spec, pair, known_values=True, copy_engine_bytes=least, piece_bytes=_SMALL_PIECE_BYTES)
        run_all(run.engines, reshard_sides.poison)
        _pull_rounds(run, 1)
        _check_equal(run, f"{pair}, {name}")
        if any(each.copy_engine_bytes for each in stats):
            _check_flipped_bit(run, pair)
    for name, flat in _PEER_WAYS.items() if with_peers else ():
        run_all(run.engines, reshard_sides.poison)
        _load_gathered(run, flat)
        _check_equal(run, f"{pair}, {name}")
    run.release()


def _check_equal(run: Machine, what: str) -> None:
    wrong = [param for found in run_all(run.engines, reshard_sides.differing) for param in found]
    if wrong:
        raise RuntimeError(f"{what}: {len(wrong)} parameters differ, first {wrong[0]}")


def _check_flipped_bit(run: Machine, pair: Pair) -> None:
    try:
        check_peer_sums(run_all(run.engines, reshard_sides.pull_with_a_flipped_bit), whole_job=True)
    except ReshardError:
        return
    raise RuntimeError(f"{pair}: a bit that was flipped after a copy engine had written it was not found")


def _pull_rounds(run: Machine, repeats: int) -> list[tuple[float, float]]:
    """(copy, whole pull with all sums and their comparison) in ms, of the slowest engine rank in each round."""
    times = run_all(run.engines, reshard_sides.time_pulls, [{"repeats": repeats}] * len(run.engines))
    rounds = []
    for ranks in zip(*times, strict=True):
        begin = time.perf_counter()
        check_peer_sums([each.sums for each in ranks], whole_job=True)
        compare_ms = (time.perf_counter() - begin) * 1e3
        rounds.append((max(each.copy_ms for each in ranks), max(each.pull_ms for each in ranks) + compare_ms))
    return rounds


def measure(
    run: Machine,
    spec: ModelSpec,
    pair: Pair,
    rates: Rates,
    *,
    repeats: int,
    with_peers: bool,
    copy_engine_bytes: int,
) -> Iterator[Row]:
    """Copy, whole pull and, if wanted, the ways it is compared with; of the slowest engine rank."""
    stats = _set_up(run, spec, pair, known_values=False, copy_engine_bytes=copy_engine_bytes, piece_bytes=PIECE_BYTES)
    copy, pull = (statistics.median(each) for each in zip(*_pull_rounds(run, repeats), strict=True))
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
        ("copy_engines", max(each.copy_engine_bytes for each in stats)),
    ):
        yield Row(case=case, metric=f"{metric}_per_rank", value=number / 1e9, unit="GB")


def _set_up(
    run: Machine,
    spec: ModelSpec,
    pair: Pair,
    *,
    known_values: bool,
    copy_engine_bytes: int,
    piece_bytes: int,
) -> list[PlanStats]:
    run.release()
    shared = {"spec": spec, "layout": pair.train, "known_values": known_values}
    trainers = run.trainers[: pair.train.world_size]
    sources = run_all(trainers, reshard_sides.hold, [{**shared, "rank": rank} for rank in range(len(trainers))])
    beside = sources[: len(run.engines)]
    places = EnginePlaces(
        hosts=tuple(source.host for source in beside),
        devices=tuple(source.device for source in beside),
        tp_size=pair.rollout_tp,
        rank=0,
    )
    common = {"spec": spec, "sources": sources, "ep_size": pair.rollout_ep}
    common |= {"copy_engine_bytes": copy_engine_bytes, "piece_bytes": piece_bytes}
    return run_all(
        run.engines, reshard_sides.bind, [{**common, "places": places.of(gpu)} for gpu in range(len(beside))]
    )


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
            yield from measure(
                run,
                spec,
                pair,
                rates,
                repeats=arguments.repeats,
                with_peers=with_peers and not arguments.only_pull,
                copy_engine_bytes=_NO_COPY if arguments.no_copy_engines else arguments.copy_engine_bytes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", default="", help="training layout of a single pair: tp, pp, vpp, ep, as tp=2,pp=2")
    parser.add_argument("--rollout", default="", help="engine layout of a single pair: tp=2 or tp=2,ep=2")
    parser.add_argument("--engine", action="store_true", help="also time the whole update of a real SGLang engine")
    parser.add_argument("--layers", type=int, default=28, help="28 is the whole dense model, 15.2 GB")
    parser.add_argument("--no-copy-engines", action="store_true", help="have the kernel copy other devices' bytes, too")
    parser.add_argument("--copy-engine-bytes", type=int, default=COPY_ENGINE_BYTES, help="fewest of their copies")
    parser.add_argument("--only-pull", action="store_true", help="do not time the ways that it is compared with")
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
