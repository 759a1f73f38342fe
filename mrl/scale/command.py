"""`mrl plan --model`: a job of a shape, computed without its GPUs, its weights or a configuration of its own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from mrl.config.load import load_config
from mrl.config.schema import PPOConfig
from mrl.observability.console import show_table
from mrl.reshard.check import parse_axes
from mrl.scale.job import Job
from mrl.scale.shapes import known_shapes, load_shape
from mrl.scale.times import Rates, bubble_fraction, predict_reshard
from mrl.scale.traffic import Traffic, plan_traffic
from mrl.trainer.machine import Machine
from mrl.trainer.plan import ShapePlan, plan_shape

_GIB = 2**30
_TRAIN_KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_MEAN_BYTES = (
    ("from its own GPU", "local_bytes"),
    ("from other GPUs of its host", "same_host_bytes"),
    ("from other hosts", "remote_bytes"),
    ("the trainer's own memory", "aliased_bytes"),
)


@dataclass(kw_only=True, frozen=True)
class ShapeRequest:
    """What `mrl plan --model` is asked."""

    model: str
    train: str
    rollout: str
    hosts: int
    gpus_per_host: int
    gpu_gib: float
    host_gib: float
    micro_batches: int | None
    most_groups: int | None
    rates: Rates
    config_name: str
    overrides: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mrl plan` that go with --model."""
    shape = parser.add_argument_group("a job of a shape", "no weights, data or tokenizer; keys can be set beside it")
    shape.add_argument("--model", help=f"a config.json, a folder with one, or one of {', '.join(known_shapes())}")
    shape.add_argument("--train", help="layout of actor, critic and reference: tp, pp, vpp, cp, ep, etp")
    shape.add_argument("--rollout", help="layout of every engine: tp, ep")
    shape.add_argument("--hosts", type=int, help="1 without it")
    shape.add_argument("--gpus-per-host", type=int, help="8 without it")
    shape.add_argument("--micro-batches", type=int, help="of a data-parallel rank's update; 4 x pp without it")
    shape.add_argument(
        "--groups", type=int, help="plan at most so many kinds of engine rank, 8 without it; 0 plans all"
    )
    rates = Rates()
    for name, rate, what in (
        ("device", rates.device_copy, "copies within a GPU"),
        ("nvlink", rates.nvlink, "what a GPU reads from its host's others"),
        ("network", rates.network, "a GPU's share of its host's network"),
    ):
        shape.add_argument(f"--{name}-gb-s", type=float, help=f"{what}; {rate:g} without it")


def check_shape_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError if an option of --model is given without it: a configuration's own keys say what it does."""
    keys = {
        "train": "actor_rollout_ref.actor.megatron.*",
        "rollout": "actor_rollout_ref.rollout.tensor_model_parallel_size",
        "hosts": "trainer.nnodes",
        "gpus_per_host": "trainer.n_gpus_per_node",
    }
    for name, key in keys.items():
        if getattr(arguments, name) is not None:
            raise ValueError(f"{_option(name)} needs --model; set {key} in a configuration")
    for name in ("micro_batches", "groups", "device_gb_s", "nvlink_gb_s", "network_gb_s"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{_option(name)} needs --model: a configuration's own plan has no bubble and no reshard")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_request(arguments: argparse.Namespace) -> ShapeRequest:
    """The request of a parsed command line.

    Raises:
        ValueError: an option is out of range.
    """
    for name in ("hosts", "gpus_per_host", "micro_batches"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{_option(name)} = {value} must be at least 1")
    default = Rates()
    return ShapeRequest(
        model=arguments.model,
        train=arguments.train or "tp=1",
        rollout=arguments.rollout or "tp=1",
        hosts=arguments.hosts or 1,
        gpus_per_host=arguments.gpus_per_host or 8,
        gpu_gib=arguments.gpu_memory_gib or 80.0,
        host_gib=arguments.host_memory_gib or 2048.0,
        micro_batches=arguments.micro_batches,
        most_groups=8 if arguments.groups is None else arguments.groups or None,
        rates=Rates(
            device_copy=default.device_copy if arguments.device_gb_s is None else arguments.device_gb_s,
            nvlink=default.nvlink if arguments.nvlink_gb_s is None else arguments.nvlink_gb_s,
            network=default.network if arguments.network_gb_s is None else arguments.network_gb_s,
        ),
        config_name=arguments.config_name,
        overrides=tuple(arguments.overrides),
    )


def show_shape(request: ShapeRequest) -> None:
    """Print layouts, memory, the pipeline's bubble and the reshard of the job.

    Raises:
        ValueError: the shape is unknown, a layout does not divide it, or a phase does not fit the memory.
    """
    spec = load_shape(request.model)
    config = _configure(request)
    gpu_bytes, host_bytes = (int(gib * _GIB) for gib in (request.gpu_gib, request.host_gib))
    plan = plan_shape(config, Machine(device="cuda", host_bytes=host_bytes, gpu_bytes=gpu_bytes), spec)
    show_table(f"{request.model} on {config.trainer.world_size} GPUs", _layout_rows(config, plan, request))
    show_table("Memory, GiB on the fullest GPU", plan.memory.rows())
    traffic = plan_traffic(_job(config, plan, request), most_groups=request.most_groups)
    show_table("Reshard, GB per engine rank", _reshard_rows(traffic, request.rates))


def _configure(request: ShapeRequest) -> PPOConfig:
    """The configuration that the options stand for; keys set beside them win."""
    rollout = parse_axes(request.rollout, ("tp", "ep"))
    keys: dict[str, int] = {
        "actor_rollout_ref.rollout.tensor_model_parallel_size": rollout.get("tp", 1),
        "trainer.nnodes": request.hosts,
        "trainer.n_gpus_per_node": request.gpus_per_host,
    } | _layout_keys("actor_rollout_ref.actor", request.train)
    if rollout.get("ep", 1) > 1:
        keys["+actor_rollout_ref.rollout.engine_kwargs.sglang.ep_size"] = rollout["ep"]
    actor_alone = _load(keys, request)
    if actor_alone.needs_critic:
        keys |= _layout_keys("critic", request.train)
    if actor_alone.needs_reference:
        keys |= _layout_keys("actor_rollout_ref.ref", request.train)
    return _load(keys, request)


def _load(keys: dict[str, int], request: ShapeRequest) -> PPOConfig:
    return load_config([*(f"{key}={value}" for key, value in keys.items()), *request.overrides], request.config_name)


def _layout_keys(section: str, axes: str) -> dict[str, int]:
    return {
        f"{section}.megatron.{_TRAIN_KEYS[axis]}": size for axis, size in parse_axes(axes, tuple(_TRAIN_KEYS)).items()
    }


def _job(config: PPOConfig, plan: ShapePlan, request: ShapeRequest) -> Job:
    rollout = config.actor_rollout_ref.rollout
    return Job(
        spec=plan.actor.spec,
        layout=plan.actor.layout,
        rollout_tp=rollout.tensor_model_parallel_size,
        rollout_ep=int(rollout.engine_kwargs.sglang.get("ep_size", 1)),
        num_engines=plan.num_engines,
        gpus_per_host=request.gpus_per_host,
        dtype=getattr(torch, config.actor_rollout_ref.actor.megatron.dtype),
        alias=rollout.alias_weights,
    )


def _layout_rows(config: PPOConfig, plan: ShapePlan, request: ShapeRequest) -> list[tuple[str, str]]:
    layout = plan.actor.layout
    count = request.micro_batches or 4 * layout.pp
    bubble = bubble_fraction(pp=layout.pp, vpp=layout.vpp, num_microbatches=count)
    rollout_tp = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    return [
        ("actor", str(plan.actor)),
        ("critic", str(plan.critic.layout) if plan.critic else "none: advantages need no values"),
        ("reference", str(plan.reference.layout) if plan.reference else "none: no KL term is configured"),
        ("rollout", f"{plan.num_engines} x SGLang at TP{rollout_tp}"),
        ("pipeline bubble", f"{bubble:.1%} of an update with {count} micro-batches on every data-parallel rank"),
    ]


def _reshard_rows(traffic: Traffic, rates: Rates) -> list[tuple[str, str]]:
    time = predict_reshard(traffic, rates)
    planned = len(traffic.groups)
    sampled = "" if planned == traffic.num_groups else f", {planned} planned: totals are scaled"
    rows = [("engine ranks", f"{traffic.num_ranks} of {traffic.num_groups} kinds{sampled}")]
    for name, size in _MEAN_BYTES:
        mean, largest = traffic.mean(size), traffic.largest(size)
        if size == "aliased_bytes" and not largest:
            continue
        total = mean * traffic.num_ranks
        rows.append((name, f"{mean / 1e9:7.2f}, at most {largest / 1e9:7.2f}; all ranks {total / 1e9:9.1f}"))
    rows += [
        ("to other hosts", f"         at most {traffic.largest('sent_bytes') / 1e9:7.2f}"),
        ("operations", f"at most {traffic.largest('copies') + traffic.largest('fills')} on a rank"),
        (
            "at least",
            f"{time.total_s * 1e3:.1f} ms: copies {time.copy_s * 1e3:.1f}, check {time.check_s * 1e3:.1f}",
        ),
        ("at GB/s", f"GPU {rates.device_copy:g}, NVLink {rates.nvlink:g}, network {rates.network:g}"),
    ]
    return rows
