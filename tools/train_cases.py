"""The cases of `bench_train.py`, as one rank runs them. Imports Megatron, and with it CUDA."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from bare_megatron import BareMegatron
from benchmark_file import Row
from kernel_times import profile_call
from train_measure import GIB, Case, Ceiling, Job, measure, memory_rows

from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.inputs import packed_inputs
from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec
from mrl.types import MicroBatchLimit, TrainBatch


def run_single(job: Job) -> None:
    """All cases of one device."""
    ceiling = Ceiling()
    parts: dict[str, Callable[[], None]] = {
        "bare": partial(measure_bare, job, ceiling),
        "actor": partial(measure_actor, job, ceiling),
        "critic": partial(measure_critic, job, ceiling),
    }
    for name, recompute in recompute_ways(job.spec).items():
        parts[f"recompute {name}"] = partial(measure_recompute, job, ceiling, name, recompute)
    for name, part in parts.items():
        if name == "bare" or any(word in name for word in job.only.split(",")):
            _attempt(name, part)


def run_pair(job: Job) -> None:
    """Scaling: each rank by itself, at the same time as the others; then all together, each with as much to do."""
    for overlap in (False, True):
        _attempt(f"data parallel, overlap {overlap}", partial(measure_data_parallel, job, overlap=overlap))


def recompute_ways(spec: ModelSpec) -> dict[str, Recompute]:
    """Settings of `override_transformer_config` that trade time for memory."""
    half = max(1, spec.num_hidden_layers // 2)
    return {
        "selective mlp": Recompute(granularity="selective", modules=("mlp",)),
        f"full, {half} layers": Recompute(granularity="full", method="block", num_layers=half),
        "full": Recompute(granularity="full", method="uniform", num_layers=1),
    }


def measure_bare(job: Job, ceiling: Ceiling) -> None:
    """Megatron-core alone: training step and forward pass; and the step with a fused cross-entropy."""
    with _released(BareMegatron(job.model, job.spec, device=job.device, dtype=getattr(torch, job.dtype))) as bare:
        batches = {shape: packed_inputs(_to_device(Case(job, shape).batch(), job.device)) for shape in job.batches}
        for shape, inputs in batches.items():
            case = Case(job, shape)
            speed = case.report("bare step", partial(bare.train, inputs))
            if speed is not None:
                ceiling.train[shape], ceiling.peak_gib[shape] = job.tokens / speed.seconds, speed.peak_gib
            speed = case.report("bare forward", partial(bare.forward, inputs), passes=1)
            if speed is not None:
                ceiling.forward[shape] = job.tokens / speed.seconds
        if bare.fuse_loss():
            for shape, inputs in batches.items():
                Case(job, shape).report("bare step, fused loss", partial(bare.train, inputs))


def measure_actor(job: Job, ceiling: Ceiling) -> None:
    """The actor's update and log-prob pass, in one and in several micro-batches, and where its time goes."""
    with _released(_engine(job, "actor")) as engine:
        for shape in job.batches:
            _measure_actor_batch(Case(job, shape, ceiling), engine)
        case = Case(job, job.batches[0], ceiling)
        batch = _policy_batch(case.batch(), engine.compute_log_probs(case.batch(), limit=case.limit(4)))
        for pieces in (2, 4):
            case.report(
                f"actor update, entropy, {pieces} micro-batches",
                partial(update_actor, engine, batch, case.limit(pieces), entropy=True),
            )
        for pieces in (1, 4):
            call = partial(update_actor, engine, batch, case.limit(pieces), entropy=True)
            _attempt(f"profile of {pieces}", partial(_profile, job, f"profile, {pieces} micro-batches", call))


def _measure_actor_batch(case: Case, engine: MegatronEngine) -> None:
    log_prob = partial(engine.compute_log_probs, case.batch(), limit=case.limit())
    case.report("log-prob pass", log_prob, passes=1)
    batch = _policy_batch(case.batch(), engine.compute_log_probs(case.batch(), limit=case.limit(4)))
    for entropy in (False, True):
        name = "actor update, entropy" if entropy else "actor update"
        case.report(name, partial(update_actor, engine, batch, case.limit(), entropy=entropy))


def measure_recompute(job: Job, ceiling: Ceiling, way: str, recompute: Recompute) -> None:
    """The actor's update where activations are computed twice: what it costs and saves."""
    case = Case(job, job.batches[0], ceiling)
    with _released(_engine(job, "actor", recompute=recompute)) as engine:
        batch = _policy_batch(case.batch(), engine.compute_log_probs(case.batch(), limit=case.limit(4)))
        update = partial(update_actor, engine, batch, case.limit(), entropy=True)
        case.report(f"actor update, entropy, recompute {way}", update)


def measure_critic(job: Job, ceiling: Ceiling) -> None:
    """The critic's update and value pass; the bound is the actor's, whose output layer is the vocabulary's."""
    case = Case(job, job.batches[0], ceiling)
    with _released(_engine(job, "critic")) as engine:
        values = partial(engine.compute_values, case.batch(), limit=case.limit())
        batch = case.batch().with_fields(values=values(), returns=torch.randn(case.shape))
        case.report("value pass", values, passes=1, head=False)
        objective = ValueObjective()
        update = partial(engine.update, batch, objective.bind(batch), limit=case.limit())
        case.report("critic update", update, head=False)


def measure_data_parallel(job: Job, *, overlap: bool) -> None:
    """Tokens/s of the actor's update on all ranks, against what one of them reaches alone. Called by all ranks."""
    case, world_size = Case(job, job.batches[0]), dist.get_world_size()
    alone = job.tokens / _update_alone(case)
    settings = DataParallelSettings(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    with _released(_engine(job, "actor", data_parallel=settings, world_size=world_size)) as engine:
        batch = _policy_batch(
            case.batch(world_size), engine.compute_log_probs(case.batch(world_size), limit=case.limit(4))
        )
        speed = measure(partial(update_actor, engine, batch, case.limit()), job)
    tokens_per_s, bound = job.tokens * world_size / speed.seconds, alone * world_size
    name = f"actor update, DP{world_size}{', overlapped' if overlap else ''}, {case.name} each"
    row = Row(
        case=name,
        metric="tokens_per_s",
        value=tokens_per_s,
        unit="tokens/s",
        limit=bound,
        ratio=tokens_per_s / bound,
        peers={"one rank": alone, "times one rank": tokens_per_s / alone},
    )
    job.report([row, *memory_rows(name, speed)])


def _update_alone(case: Case) -> float:
    """Seconds of an update of a rank that shares nothing with the others, the slowest rank's."""
    store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    backend = dist.get_backend()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with _released(_engine(case.job, "actor")) as engine:
        batch = _policy_batch(case.batch(), engine.compute_log_probs(case.batch(), limit=case.limit(4)))
        speed = measure(partial(update_actor, engine, batch, case.limit()), case.job)
    dist.destroy_process_group()
    rounds = store.add(f"alone/{rank}", 1)
    again = dist.PrefixStore(f"together/{rounds}", store)
    dist.init_process_group(backend, store=again, rank=rank, world_size=world_size)
    slowest = torch.tensor(speed.seconds, dtype=torch.float64, device=case.job.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def update_actor(
    engine: MegatronEngine, batch: TrainBatch, limit: MicroBatchLimit, *, entropy: bool = False
) -> dict[str, float]:
    """One optimizer step on PPO's clipped objective."""
    objective = PolicyObjective(monitor_entropy=entropy)
    return engine.update(batch, objective.bind(batch), limit=limit, with_entropy=objective.needs_entropy)


def _profile(job: Job, case: str, call: Callable[[], Any]) -> None:
    times = profile_call(call)
    if times is None:
        return
    print(f"{case}\n{times.table()}", flush=True)
    share = times.busy_ms / times.span_ms
    busy = Row(case=case, metric="busy", value=times.busy_ms, unit="ms", limit=times.span_ms, ratio=share)
    top = [
        Row(case=case, metric=name[:120], value=ms, unit="ms", peers={"calls": count})
        for name, ms, count in times.kernels[:15]
    ]
    job.report([busy, *top])


def _policy_batch(batch: TrainBatch, log_probs: torch.Tensor) -> TrainBatch:
    return batch.with_fields(old_log_probs=log_probs, advantages=torch.randn(log_probs.shape))


def _engine(
    job: Job,
    kind: Literal["actor", "critic"],
    *,
    recompute: Recompute | None = None,
    data_parallel: DataParallelSettings | None = None,
    world_size: int = 1,
) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind=kind,
            model_path=job.model,
            spec=job.spec,
            layout=ParallelLayout(world_size=world_size),
            dtype=job.dtype,
            device=job.device.type,
            packed=True,
            optimizer=OptimizerSettings(lr=1e-6),
            data_parallel=data_parallel or DataParallelSettings(use_distributed_optimizer=True),
            recompute=recompute or Recompute(),
        )
    )


def _to_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    return TrainBatch(
        tokens=batch.tokens.to(device), lengths=batch.lengths.to(device), loss_mask=batch.loss_mask.to(device)
    )


@contextmanager
def _released[Closable: (BareMegatron, MegatronEngine)](built: Closable) -> Iterator[Closable]:
    """Close it after the block and give its memory back; what stays is said."""
    try:
        yield built
    finally:
        built.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated() / GIB
            if left > 1:
                print(f"{left:.1f} GiB are still held after {type(built).__name__} was closed", flush=True)


def _attempt(name: str, part: Callable[[], None]) -> None:
    """Run a part of the benchmark; its error is printed and the others go on."""
    start = time.perf_counter()
    try:
        part()
    except Exception:
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
    if dist.get_rank() == 0:
        print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)
