"""Starting what a rank needs before it can build a trainer: its rollout engine and torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch

from mrl.backends.sglang.engine import SGLangEngine
from mrl.config.frozen import thaw
from mrl.config.schema import PPOConfig
from mrl.launch.environment import RankEnvironment
from mrl.launch.rendezvous import init_process_group
from mrl.trainer.phases import ENGINE_TAGS
from mrl.trainer.plan import RunPlan


def start_rank(config: PPOConfig, plan: RunPlan, env: RankEnvironment) -> SGLangEngine | None:
    """This rank's engine, if it leads one, and torch.distributed.

    An engine forks its processes, so it comes first; the process group forms while they load.
    """
    join = partial(_init_process_group, config, plan, env)
    leads = env.rank % plan.rollout_tp == 0 and env.rank // plan.rollout_tp < plan.num_engines
    if leads:
        engine = _start_engine(config, plan, env, during_start=join)
        # The trainer is built in the memory that the engine will use later.
        engine.release_memory(engine_tags(config, plan))
        return engine
    join()
    return None


def _init_process_group(config: PPOConfig, plan: RunPlan, env: RankEnvironment) -> None:
    backend = "gloo"
    if plan.device == "cuda":
        torch.cuda.set_device(env.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    init_process_group(env, backend=backend, timeout=timedelta(seconds=config.trainer.phase_timeout_s))


def _start_engine(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, *, during_start: Callable[[], None]
) -> SGLangEngine:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    context_length = config.data.max_prompt_length + config.data.max_response_length
    on_gpu = plan.device == "cuda"
    arguments = {"base_gpu_id": env.local_rank, "disable_cuda_graph": rollout.enforce_eager} if on_gpu else {}
    return SGLangEngine.start(
        plan.actor.model_path,
        tp_size=plan.rollout_tp,
        dtype=rollout.dtype,
        device=plan.device,
        context_length=context_length,
        max_running_requests=rollout.max_num_seqs,
        max_total_tokens=None if on_gpu else rollout.max_num_seqs * (context_length + 1),
        mem_fraction_static=rollout.gpu_memory_utilization if on_gpu else None,
        seed=trainer.seed + env.rank,
        start_timeout_s=trainer.engine_start_timeout_s,
        call_timeout_s=trainer.engine_call_timeout_s,
        during_start=during_start,
        engine_kwargs={
            "chunked_prefill_size": rollout.max_num_batched_tokens,
            **arguments,
            **thaw(rollout.engine_kwargs.sglang),
        },
    )


def engine_tags(config: PPOConfig, plan: RunPlan) -> tuple[str, ...]:
    """What engines give back while the trainer works; nothing where memory is not shared."""
    releases = plan.device == "cuda" and config.actor_rollout_ref.rollout.free_cache_engine
    return ENGINE_TAGS if releases else ()
