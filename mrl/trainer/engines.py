"""Starting what a rank needs before it can build a trainer: its rollout engine and torch.distributed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch

from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.follower import EngineFollower
from mrl.backends.sglang.parts import EnginePart
from mrl.config.frozen import thaw
from mrl.config.schema import PPOConfig
from mrl.launch.environment import RankEnvironment
from mrl.launch.rendezvous import init_process_group
from mrl.launch.watchdog import Watchdog
from mrl.trainer.phases import ENGINE_TAGS
from mrl.trainer.plan import RunPlan

logger = logging.getLogger(__name__)


def start_rank(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, watchdog: Watchdog
) -> SGLangEngine | EngineFollower | None:
    """This rank's engine, or its part of one that another host leads, and torch.distributed; the watchdog then watches.

    An engine forks its processes, so it comes first; the process group forms while they load.
    """
    if plan.device == "cuda":
        # Before the engine starts: its processes may get to see the GPUs in another order than this one.
        torch.cuda.set_device(env.local_rank)
    join = partial(_join, plan, env, watchdog)
    part = engine_part(plan, env)
    if part is None:
        join()
        return None
    if not part.leads:
        return _start_follower(config, plan, env, part, during_start=join)
    begin = time.perf_counter()
    engine = _start_engine(config, plan, env, part, during_start=join)
    logger.info("rollout engine started in %.1f s", time.perf_counter() - begin)
    # The trainer is built in the memory that the engine will use later.
    engine.release_memory(engine_tags(config, plan))
    return engine


def engine_part(plan: RunPlan, env: RankEnvironment) -> EnginePart | None:
    """What this rank starts: an engine lives on consecutive ranks, and the first of them on each host starts its part.

    None for the ranks that start nothing.
    """
    index, place = divmod(env.rank, plan.rollout_tp)
    if index >= plan.num_engines or place % min(plan.rollout_tp, env.local_world_size):
        return None
    return EnginePart(
        name=f"engine/{env.attempt}/{index}",
        store_host=env.master_addr,
        store_port=env.master_port,
        num_hosts=max(1, plan.rollout_tp // env.local_world_size),
        host_index=place // env.local_world_size,
    )


def _join(plan: RunPlan, env: RankEnvironment, watchdog: Watchdog) -> None:
    backend = "gloo"
    if plan.device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    init_process_group(env, backend=backend, timeout=timedelta(seconds=watchdog.deadlines.collective_s))
    watchdog.start()


def _start_engine(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, part: EnginePart, *, during_start: Callable[[], None]
) -> SGLangEngine:
    trainer = config.trainer
    return SGLangEngine.start(
        _engine_settings(config, plan, env),
        part=part,
        start_timeout_s=trainer.engine_start_timeout_s,
        call_timeout_s=trainer.engine_call_timeout_s,
        during_start=during_start,
    )


def _start_follower(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, part: EnginePart, *, during_start: Callable[[], None]
) -> EngineFollower:
    return EngineFollower.start(
        _engine_settings(config, plan, env),
        part=part,
        start_timeout_s=config.trainer.engine_start_timeout_s,
        during_start=during_start,
    )


def _engine_settings(config: PPOConfig, plan: RunPlan, env: RankEnvironment) -> EngineSettings:
    rollout = config.actor_rollout_ref.rollout
    on_gpu = plan.device == "cuda"
    arguments = {"disable_cuda_graph": rollout.enforce_eager} if on_gpu else {}
    return EngineSettings(
        model_path=plan.actor.model_path,
        tp_size=plan.rollout_tp,
        dtype=rollout.dtype,
        device=plan.device,
        context_length=rollout.max_model_len or config.data.max_length,
        max_running_requests=rollout.max_num_seqs,
        max_total_tokens=None if on_gpu else rollout.max_num_seqs * (config.data.max_length + 1),
        mem_fraction_static=rollout.gpu_memory_utilization if on_gpu else None,
        alias_weights=rollout.alias_weights,
        # The same for all parts of an engine: that of its first rank.
        seed=config.trainer.seed + env.rank - env.rank % plan.rollout_tp,
        gpus=part_gpus(plan, env),
        engine_kwargs={
            "chunked_prefill_size": rollout.max_num_batched_tokens,
            "enable_return_routed_experts": config.replays_routers,
            **arguments,
            **thaw(rollout.engine_kwargs.sglang),
        },
    )


def part_gpus(plan: RunPlan, env: RankEnvironment) -> tuple[int, ...]:
    """The host's GPUs, counted from 0, that this part's ranks run on, in their order; none on CPU."""
    if plan.device == "cpu":
        return ()
    size, host = min(plan.rollout_tp, env.local_world_size), env.rank - env.local_rank
    return tuple(rank - host for rank in plan.beside[env.rank : env.rank + size])


def engine_tags(config: PPOConfig, plan: RunPlan) -> tuple[str, ...]:
    """What engines give back while the trainer works; nothing where memory is not shared."""
    releases = plan.device == "cuda" and config.actor_rollout_ref.rollout.free_cache_engine
    return ENGINE_TAGS if releases else ()
