"""The memory plan of a configuration."""

from __future__ import annotations

from dataclasses import replace

from mrl.config.megatron import MegatronConfig, TrainableMegatronConfig
from mrl.config.schema import PPOConfig
from mrl.parallel.auto_layout import BytesPerParameter
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec
from mrl.scale.traffic import plan_traffic
from mrl.trainer.engine_plan import weights_job
from mrl.trainer.machine import Machine
from mrl.trainer.memory_plan import EngineMemory, MemoryPlan, RoleMemory, plan_device_memory, plan_host_memory

_MOST_GROUPS = 4
"""Kinds of engine ranks whose reshard is planned to see what they share with the actor."""
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def role_memory(
    name: str, spec: ModelSpec, layout: ParallelLayout, megatron: MegatronConfig, *, trained: bool
) -> RoleMemory:
    """What one role holds, and what of it its offload keys take off the device; an actor's weights stay."""
    weight = _ITEM_SIZE[megatron.dtype]
    if not isinstance(megatron, TrainableMegatronConfig) or not trained:
        per = BytesPerParameter.of(weight=weight, trained=False)
        return RoleMemory(
            name=name, spec=spec, layout=layout, bytes_per_parameter=per, offloads_weights=megatron.param_offload
        )
    return RoleMemory(
        name=name,
        spec=spec,
        layout=layout,
        bytes_per_parameter=BytesPerParameter.of(
            weight=weight, trained=True, distributed_optimizer=megatron.use_distributed_optimizer
        ),
        offloads_weights=megatron.param_offload and name != "actor",
        offloads_gradients=megatron.grad_offload or megatron.param_offload,
        offloads_optimizer=megatron.optimizer_offload,
    )


def plan_memory(
    config: PPOConfig, machine: Machine, roles: list[RoleMemory], *, actor: ModelSpec, num_engines: int
) -> MemoryPlan:
    """Who holds what on the fullest GPU or, on CPU, on a host.

    Raises:
        ValueError: a phase cannot fit; says what takes how much.
    """
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    on_gpu = machine.device == "cuda"
    engine = EngineMemory(
        spec=actor,
        tp=rollout.tensor_model_parallel_size,
        bytes_per_weight=_ITEM_SIZE[rollout.dtype],
        static_fraction=rollout.gpu_memory_utilization if on_gpu else None,
        kv_tokens=rollout.max_num_seqs * config.data.max_length,
        releases=on_gpu and rollout.free_cache_engine,
        crosses_hosts=trainer.nnodes > 1,
        aliased_bytes=_aliased_bytes(config, roles, num_engines) if rollout.alias_weights else 0,
    )
    if on_gpu:
        host_share = machine.host_bytes // trainer.n_gpus_per_node
        plan = plan_device_memory(roles, engine, gpu_bytes=machine.gpu_bytes, host_bytes_per_rank=host_share)
    else:
        plan = plan_host_memory(roles, engine, num_engines=num_engines, host_bytes=machine.host_bytes * trainer.nnodes)
    plan.check()
    return plan


def _aliased_bytes(config: PPOConfig, roles: list[RoleMemory], num_engines: int) -> int:
    """Of an engine rank's weights, how many are the actor's memory; of the rank with fewest."""
    actor = next(role for role in roles if role.name == "actor")
    job = replace(weights_job(config, actor.spec, actor.layout, num_engines), alias=True)
    return min(group.stats.aliased_bytes for group in plan_traffic(job, most_groups=_MOST_GROUPS).groups)
