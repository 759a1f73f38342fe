"""Small jobs on paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from model_specs import make_spec

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.plan import Plan, build_plan
from mrl.reshard.routes import EnginePlaces
from mrl.reshard.spec import MixtureOfExperts, ModelSpec
from mrl.scale.exports import engine_params, host_name, trainer_exports
from mrl.scale.job import Job

DENSE = make_spec(
    family="llama",
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=False,
)
EXPERTS = dataclasses.replace(
    DENSE,
    family="qwen3_moe",
    qk_layernorm=True,
    moe=MixtureOfExperts(num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
)


def job(
    spec: ModelSpec, *, world_size: int, rollout_tp: int = 2, rollout_ep: int = 1, gpus_per_host: int = 4, **axes: Any
) -> Job:
    """A job whose engines take all of its ranks."""
    return Job(
        spec=spec,
        layout=ParallelLayout(world_size=world_size, **axes),
        rollout_tp=rollout_tp,
        rollout_ep=rollout_ep,
        num_engines=world_size // rollout_tp,
        gpus_per_host=gpus_per_host,
        dtype=torch.bfloat16,
    )


def plans(job: Job, beside: Sequence[int]) -> list[Plan]:
    """Of every engine rank, on the GPU of the trainer rank that `beside` names."""
    sources = trainer_exports(job.spec, job.layout, dtype=job.dtype, gpus_per_host=job.gpus_per_host)
    targets = engine_params(job.spec, tp=job.rollout_tp, ep=job.rollout_ep, dtype=job.dtype)
    hosts = tuple(host_name(rank, job.gpus_per_host) for rank in range(len(beside)))
    devices = tuple(rank % job.gpus_per_host for rank in beside)
    return [
        build_plan(
            job.spec,
            sources,
            targets,
            tp_rank=rank % job.rollout_tp,
            tp_size=job.rollout_tp,
            ep_size=job.rollout_ep,
            host=hosts[rank],
            device=devices[rank],
            places=EnginePlaces(hosts=hosts, devices=devices, tp_size=job.rollout_tp, rank=rank),
        )
        for rank in range(len(beside))
    ]


JOBS = {
    "stages on hosts of their own": job(DENSE, world_size=32, tp=2, pp=4),
    "stages that share hosts": job(DENSE, world_size=32, pp=4, rollout_tp=4, gpus_per_host=16),
    "engines over two hosts": job(DENSE, world_size=32, tp=2, pp=2, rollout_tp=8),
    "experts": job(EXPERTS, world_size=16, tp=2, pp=2, ep=4, rollout_tp=4, rollout_ep=2),
    "experts in parts": job(EXPERTS, world_size=16, tp=4, pp=2, ep=2, etp=2, rollout_tp=4),
}
