"""How many rollout engines a job has, on which GPUs their ranks run, and whether they can get their weights."""

from __future__ import annotations

import torch

from mrl.config.schema import PPOConfig
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec
from mrl.scale.job import Job
from mrl.scale.placement import place_engines


def count_engines(config: PPOConfig, actor: ModelSpec, device: str) -> int:
    """Engines of the job.

    Raises:
        ValueError: their tensor parallelism does not fit the model, the hosts or the job.
    """
    rollout, world_size = config.actor_rollout_ref.rollout, config.trainer.world_size
    tp, key = rollout.tensor_model_parallel_size, "actor_rollout_ref.rollout.tensor_model_parallel_size"
    if world_size % tp:
        raise ValueError(f"{key} = {tp} does not divide the job's {world_size} ranks")
    if actor.num_attention_heads % tp:
        raise ValueError(f"{key} = {tp} does not divide the actor's {actor.num_attention_heads} attention heads")
    if device == "cpu" and actor.num_key_value_heads % tp:
        raise ValueError(
            f"{key} = {tp} does not divide the actor's {actor.num_key_value_heads} KV heads; SGLang replicates KV "
            "heads on GPUs only, so choose a divisor on CPU"
        )
    per_host = config.trainer.n_gpus_per_node
    if tp % per_host and per_host % tp:
        raise ValueError(
            f"{key} = {tp} and trainer.n_gpus_per_node = {per_host}: neither divides the other, and an engine takes "
            "whole hosts or a part of one; choose a divisor or a multiple"
        )
    most = world_size // tp
    num_engines = rollout.num_engines or most
    if num_engines > most:
        raise ValueError(
            f"actor_rollout_ref.rollout.num_engines = {num_engines} at TP{tp} needs {num_engines * tp} ranks; "
            f"the job has {world_size}"
        )
    return num_engines


def check_senders(config: PPOConfig, actor: ParallelLayout, num_engines: int) -> None:
    """ValueError if a part of the actor lies only on hosts without engines, which alone could send it to the others."""
    per_host, tp = config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout.tensor_model_parallel_size
    with_engines = -(-num_engines * tp // per_host) * per_host

    def part(rank: int) -> tuple[int, int, int, int]:
        tp_rank, _, _, pp_rank = actor.coordinates(rank)
        return tp_rank, pp_rank, actor.ep_rank(rank), actor.etp_rank(rank)

    held = {part(rank) for rank in range(with_engines)}
    alone = sorted({rank // per_host for rank in range(with_engines, actor.world_size) if part(rank) not in held})
    if alone:
        raise ValueError(
            f"actor_rollout_ref.rollout.num_engines = {num_engines} at TP{tp} leaves hosts {alone} (counted from 0) "
            f"without an engine, but no other host holds their part of the actor ({actor}): nothing could send it to "
            "the engines; raise num_engines, or choose a layout whose replicas lie on the hosts with engines"
        )


def weights_job(config: PPOConfig, spec: ModelSpec, layout: ParallelLayout, num_engines: int) -> Job:
    """The job as far as the actor's weights are concerned, copied and not aliased."""
    rollout = config.actor_rollout_ref.rollout
    return Job(
        spec=spec,
        layout=layout,
        rollout_tp=rollout.tensor_model_parallel_size,
        rollout_ep=int(rollout.engine_kwargs.sglang.get("ep_size", 1)),
        num_engines=num_engines,
        gpus_per_host=config.trainer.n_gpus_per_node,
        dtype=getattr(torch, rollout.dtype),
    )


def ranks_beside_engines(
    config: PPOConfig, spec: ModelSpec, layout: ParallelLayout, num_engines: int, device: str
) -> tuple[int, ...]:
    """For every engine rank, engine by engine, the trainer rank whose GPU it shares; on CPU simply in order."""
    if device == "cpu":
        return tuple(range(num_engines * config.actor_rollout_ref.rollout.tensor_model_parallel_size))
    return place_engines(weights_job(config, spec, layout, num_engines))
