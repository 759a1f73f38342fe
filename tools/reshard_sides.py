"""Both sides of a reshard without Megatron and SGLang: their parameters in their layouts, each in a GPU's process."""

from __future__ import annotations

import gc
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_workers import State
from torch import Tensor

from mrl import ops
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.families import tensor_shapes
from mrl.reshard.layout import SourceBuffer, SourceRank, targets_of
from mrl.reshard.peer_sums import PeerSums
from mrl.reshard.plan import PlanStats, build_plan
from mrl.reshard.reference import StateDict, sglang_shard
from mrl.reshard.routes import EnginePlaces
from mrl.reshard.spec import ModelSpec
from mrl.reshard.synthetic import distinct_state, in_one_buffer, trainer_shard
from mrl.reshard.transport import close_buffers, device_number, export_source, export_storage, open_buffer

HOST = socket.gethostname()
_MEGATRON_VOCAB_MULTIPLE = 128
_SGLANG_VOCAB_MULTIPLE = 64
_BARRIER_S = 60.0
_DTYPE = torch.bfloat16


@dataclass(kw_only=True, frozen=True)
class TrainerSide:
    """One rank's parameters in one flat buffer."""

    spec: ModelSpec
    layout: ParallelLayout
    rank: int
    params: dict[str, Tensor]


@dataclass(kw_only=True, frozen=True)
class EngineSide:
    """One engine rank's parameters and the puller that fills them."""

    spec: ModelSpec
    tp_rank: int
    tp_size: int
    ep_size: int
    params: dict[str, Tensor]
    puller: Puller


@dataclass(kw_only=True, frozen=True)
class PullTimes:
    """One pull of an engine rank."""

    copy_ms: float
    """Until the last byte was there."""
    pull_ms: float
    """The whole call, with all sums that this rank takes."""
    sums: PeerSums
    """To be compared with the other ranks'."""


def meta_state(spec: ModelSpec) -> dict[str, Tensor]:
    """The checkpoint's names and shapes."""
    return {name: torch.empty(shape, dtype=_DTYPE, device="meta") for name, shape in tensor_shapes(spec).items()}


def megatron_shard(spec: ModelSpec, state: StateDict, layout: ParallelLayout, rank: int) -> dict[str, Tensor]:
    """One trainer rank's parameters, the vocabulary padded as Megatron's users pad it."""
    multiple = _MEGATRON_VOCAB_MULTIPLE * layout.tp
    return trainer_shard(spec, state, layout, rank, padded_vocab_size=_padded(spec.vocab_size, multiple))


def engine_shard(spec: ModelSpec, state: StateDict, *, tp_rank: int, tp_size: int, ep_size: int) -> dict[str, Tensor]:
    """One engine rank's parameters, the vocabulary padded as SGLang pads it."""
    rows = _padded(spec.vocab_size, _SGLANG_VOCAB_MULTIPLE)
    return sglang_shard(state, spec, tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=rows, ep_size=ep_size)


def hold(state: State, *, spec: ModelSpec, layout: ParallelLayout, rank: int, known_values: bool) -> SourceRank:
    """Allocate and export a trainer rank's parameters: of `distinct_state`, or random bits."""
    weights = distinct_state(spec, _DTYPE) if known_values else meta_state(spec)
    params = in_one_buffer(megatron_shard(spec, weights, layout, rank), "cuda")
    if not known_values:
        storage = next(iter(params.values())).untyped_storage()
        torch.empty(0, dtype=torch.int64, device="cuda").set_(storage).random_()
    torch.cuda.synchronize()
    state["trainer"] = TrainerSide(spec=spec, layout=layout, rank=rank, params=params)
    return export_source(
        params.items(),
        rank=rank,
        tp_rank=layout.coordinates(rank)[0],
        tp_size=layout.tp,
        etp_rank=layout.etp_rank(rank),
        etp_size=layout.etp,
        host=HOST,
        device=device_number(torch.device("cuda", torch.cuda.current_device())),
    )


def bind(
    state: State,
    *,
    spec: ModelSpec,
    sources: list[SourceRank],
    places: EnginePlaces,
    ep_size: int,
    copy_engine_bytes: int,
    piece_bytes: int,
) -> PlanStats:
    """Allocate an engine rank's parameters and make the puller that fills them from `sources`."""
    place = {"tp_rank": places.tp_rank, "tp_size": places.tp_size, "ep_size": ep_size}
    shapes = engine_shard(spec, meta_state(spec), **place)
    params = {name: torch.empty(tensor.shape, dtype=_DTYPE, device="cuda") for name, tensor in shapes.items()}
    plan = build_plan(
        spec,
        sources,
        targets_of(params.items()),
        host=HOST,
        device=device_number(torch.device("cuda", torch.cuda.current_device())),
        places=places,
        copy_engine_bytes=copy_engine_bytes,
        **place,
    )
    puller = Puller(plan, open_sources(plan, sources), params, piece_bytes=piece_bytes)
    state["engine"] = EngineSide(spec=spec, params=params, puller=puller, **place)
    return plan.stats


def poison(state: State) -> None:
    """Fill the engine rank's parameters with NaN."""
    for param in state["engine"].params.values():
        param.fill_(torch.nan)
    torch.cuda.synchronize()


def differing(state: State) -> list[str]:
    """Engine parameters that are not bitwise what the slow reference makes of `distinct_state`."""
    side: EngineSide = state["engine"]
    state_dict = distinct_state(side.spec, _DTYPE)
    expected = engine_shard(side.spec, state_dict, tp_rank=side.tp_rank, tp_size=side.tp_size, ep_size=side.ep_size)
    return [
        name
        for name, param in side.params.items()
        if not torch.equal(param.cpu().view(torch.int16), expected[name].contiguous().view(torch.int16))
    ]


def time_pulls(state: State, *, repeats: int) -> list[PullTimes]:
    """Pulls with all engine ranks starting together; two more rounds to warm up."""
    times = []
    for _ in range(repeats + 2):
        state["barrier"].wait(_BARRIER_S)
        begin = time.perf_counter()
        result = state["engine"].puller.pull()
        pull_ms, copy_s = (time.perf_counter() - begin) * 1e3, result.seconds - result.verify_seconds
        times.append(PullTimes(copy_ms=copy_s * 1e3, pull_ms=pull_ms, sums=result.sums))
    return times[2:]


def pull_with_a_flipped_bit(state: State) -> PeerSums:
    """The sums of a pull in which one bit changes behind every call of the copy engines."""
    copy = ops.copy_engine_copy_

    def copy_and_flip(anchor: Tensor, descriptors: Tensor) -> None:
        copy(anchor, descriptors)
        ops.tensor_from_ptr(int(descriptors[0, 2]), 1, anchor.device).bitwise_xor_(1)

    ops.copy_engine_copy_ = copy_and_flip
    try:
        return state["engine"].puller.pull().sums
    finally:
        ops.copy_engine_copy_ = copy


def release(state: State) -> None:
    """Free what the worker holds; engine ranks before trainer ranks, whose memory they have mapped."""
    state.pop("engine", None)
    state.pop("trainer", None)
    state.pop("block", None)
    close_buffers()
    gc.collect()
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


def hold_block(state: State, *, num_bytes: int) -> SourceBuffer:
    """Allocate and export one block of random bytes."""
    state["block"] = torch.empty(num_bytes // 8, dtype=torch.int64, device="cuda").random_()
    torch.cuda.synchronize()
    return export_storage(state["block"])


def copy_rates(state: State, *, blocks: list[SourceBuffer | None], repeats: int) -> list[float | None]:
    """GB/s one way of cudaMemcpyAsync from each block into own memory, all workers at the same time."""
    rates: list[float | None] = []
    for block in blocks:
        state["barrier"].wait(_BARRIER_S)
        rates.append(None if block is None else _copy_rate(open_buffer(block), repeats))
    close_buffers()
    return rates


def warm_up(state: State) -> None:
    """Compile or load the kernels, once, before any barrier."""
    ops.build_tiles(torch.empty(0, 6, dtype=torch.int64))


def _copy_rate(source: Tensor, repeats: int) -> float:
    target = torch.empty_like(source)
    return source.numel() / median_ms(lambda: target.copy_(source), repeats) / 1e6


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median of the work's time on the current stream, after two rounds to warm up."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def _padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
