"""Building the engine of one role from plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from mrl.backends.host_copies import build_copier
from mrl.backends.megatron.buffers import flatten_parameters
from mrl.backends.megatron.engine import EngineParts, MegatronEngine, TrainingParts
from mrl.backends.megatron.groups import build_groups
from mrl.backends.megatron.hf_weights import load_weights, read_score_weight
from mrl.backends.megatron.model import ModelChunk, Recompute, build_chunks, transformer_config
from mrl.backends.megatron.offload import OffloadSettings
from mrl.backends.megatron.optimizer import (
    DataParallelSettings,
    OptimizerSettings,
    build_optimizer,
    check_resumable,
    wrap_data_parallel,
)
from mrl.backends.megatron.role_state import RoleState
from mrl.backends.megatron.router_replay import RouterReplay
from mrl.backends.megatron.schedule import Schedule
from mrl.backends.megatron.value_head import ValueHead
from mrl.parallel.agreement import gather_results
from mrl.parallel.auto_layout import check_layout
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, frozen=True)
class RoleSetup:
    """Everything that makes one role's engine."""

    kind: Literal["actor", "critic", "reference", "reward_model"]
    model_path: str
    """Hugging Face folder or checkpoint with the initial weights."""
    spec: ModelSpec
    layout: ParallelLayout
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = 0
    temperature: float = 1.0
    """At which responses are sampled and log-probs taken."""
    packed: bool = False
    """Run the samples of a micro-batch end to end instead of padded to the longest."""
    optimizer: OptimizerSettings | None = None
    """None: forward passes only."""
    data_parallel: DataParallelSettings = field(default_factory=DataParallelSettings)
    recompute: Recompute = field(default_factory=Recompute)
    offload: OffloadSettings = field(default_factory=OffloadSettings)
    router_replay: bool = False
    """Send tokens to the experts that a batch names, instead of the router's own choice."""
    value_head_std: float = 0.02
    timeout_s: float = 1800.0
    """Longest wait for other ranks in a collective."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} is not supported by Megatron roles; use {' or '.join(_DTYPES)}")
        if self.kind in ("reference", "reward_model") and self.optimizer is not None:
            raise ValueError(f"a {self.kind.replace('_', ' ')} is not trained; its optimizer must be None")
        if self.kind == "actor" and self.offload.parameters:
            raise ValueError("an actor's parameters stay on the device, where engines read them in place")
        if self.layout.cp > 1 and not self.packed:
            raise ValueError(
                f"context_parallel_size = {self.layout.cp} shares packed sequences only; set use_remove_padding=True"
            )
        if self.router_replay and (self.kind != "actor" or self.spec.moe is None):
            raise ValueError(
                f"router_replay needs an actor with experts; this is a {self.kind} of family {self.spec.family}"
            )
        check_layout(self.layout, self.spec)


def build_engine(setup: RoleSetup) -> MegatronEngine:
    """The role's engine, with its weights loaded. Called by all ranks, with torch.distributed initialised.

    Raises:
        ValueError: the layout is for another world size, the model folder has no, missing or wrong weights, or the
            gradient buckets could not be checkpointed. Raised on all ranks.
    """
    if setup.layout.world_size != dist.get_world_size():
        raise ValueError(f"layout {setup.layout} is for {setup.layout.world_size} ranks, not {dist.get_world_size()}")
    device, dtype = torch.device(setup.device), _DTYPES[setup.dtype]
    has_value_head = setup.kind in ("critic", "reward_model")
    state = RoleState()
    with state:
        groups = build_groups(setup.layout, seed=setup.seed, timeout_s=setup.timeout_s)
        config = transformer_config(setup.spec, setup.layout, dtype=dtype, recompute=setup.recompute)
        chunks = build_chunks(setup.spec, setup.layout, config, groups, has_value_head=has_value_head, device=device)
        gather_results(lambda: _load(setup, chunks, groups))
        if setup.optimizer is None or not setup.data_parallel.use_distributed_optimizer:
            for chunk in chunks:
                flatten_parameters(chunk)
        training = _build_training(setup, chunks, config, groups) if setup.optimizer else None
        modules: Sequence[torch.nn.Module] = training.modules if training else _frozen(chunks)
        replay = None
        if setup.router_replay:
            assert setup.spec.moe is not None
            replay = RouterReplay(chunks, groups, k=setup.spec.moe.num_experts_per_tok)
        schedule = Schedule(modules, config, groups, setup.layout, replay)
    return MegatronEngine(
        EngineParts(
            state=state,
            groups=groups,
            layout=setup.layout,
            chunks=chunks,
            schedule=schedule,
            replay=replay,
            training=training,
            spec=setup.spec,
            temperature=setup.temperature,
            has_value_head=has_value_head,
            packed=setup.packed,
            device=device,
            offload=setup.offload,
            copier=build_copier(device),
        )
    )


def _load(setup: RoleSetup, chunks: Sequence[ModelChunk], groups: ProcessGroupCollection) -> None:
    parameters = [item for chunk in chunks for item in chunk.named_parameters()]
    for chunk in chunks:
        head = getattr(chunk.bare, "output_layer", None)
        if isinstance(head, ValueHead):
            if setup.kind == "reward_model":
                head.load_score(read_score_weight(setup.model_path, setup.spec))
            else:
                head.reset(std=setup.value_head_std, seed=setup.seed)
            parameters = [item for item in parameters if not item[0].startswith("output_layer.")]
    load_weights(
        setup.model_path,
        setup.spec,
        parameters,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        etp_rank=groups.expt_tp.rank(),
        etp_size=groups.expt_tp.size(),
        backbone_only=setup.kind in ("critic", "reward_model"),
    )


def _build_training(
    setup: RoleSetup, chunks: Sequence[ModelChunk], config: TransformerConfig, groups: ProcessGroupCollection
) -> TrainingParts:
    assert setup.optimizer is not None
    settings = setup.data_parallel
    modules = wrap_data_parallel(chunks, settings, groups)
    if settings.resumable:
        gather_results(lambda: check_resumable(modules))
    optimizer, scheduler = build_optimizer(modules, setup.optimizer, groups, dtype=_DTYPES[setup.dtype])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = _finalize_sums
    if settings.overlap_grad_reduce:
        no_sync = [module.no_sync for module in modules]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return TrainingParts(modules=modules, optimizer=optimizer, scheduler=scheduler)


def _finalize_sums(
    modules: list[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Reduce gradients without dividing: the losses already carry their mini-batch's denominators."""
    finalize_model_grads(modules, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def _frozen(chunks: Sequence[ModelChunk]) -> list[torch.nn.Module]:
    for chunk in chunks:
        chunk.bare.requires_grad_(False)
    return [chunk.module for chunk in chunks]
