"""Saving and loading one trained role with megatron-core's dist_checkpointing, from any layout into any other.

Tensors are stored by their global name and position, so that tensor, pipeline, virtual-pipeline and data-parallel sizes
may all differ when they are loaded, the optimizer's state included.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core.dist_checkpointing as dist_checkpointing
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mrl.backends.megatron.checkpoint_write import HostBuffer, PlanOnly, StagedCheckpoint
from mrl.backends.megatron.optimizer import chained_optimizers
from mrl.backends.megatron.role_state import device_rng_state, set_device_rng_state
from mrl.backends.megatron.state_gather import state_shared_out

if TYPE_CHECKING:
    from mrl.backends.megatron.engine import EngineParts, TrainingParts

_EXTRA_STATE = "_extra_state"
_FORMAT = {
    # Of the distributed optimizer's formats the one that loads in every layout; the default one is no longer supported.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def stage_role(parts: EngineParts, folder: Path, host: HostBuffer | None) -> StagedCheckpoint:
    """Parameters, optimizer, learning-rate progress and random states of now, to be written to the empty `folder`.

    Called by all ranks, inside the role's state. Data-parallel ranks divide among them what they all have.

    Args:
        host: where to copy what training changes; None if all is written before training goes on.
    """
    state = _sharded_state(parts, is_loading=False) | {
        "rng_layout": _rng_layout(parts),
        "rng": _rng_object(parts.groups),
    }
    plan = PlanOnly()
    dist_checkpointing.save(
        state,
        str(folder),
        FullyParallelSaveStrategyWrapper(plan, parts.groups.dp_cp),
        async_sharded_save=True,
        async_strategy="mcore",
        content_metadata=dict(_FORMAT),
    )
    staged = StagedCheckpoint(folder, plan)
    if host is not None:
        staged.detach(_live_storages(parts), host)
    return staged


@torch.no_grad()
def load_role(parts: EngineParts, folder: Path, contents: Collection[str]) -> None:
    """Fill a role from what `stage_role` wrote, in whatever layout that was.

    Hyperparameters (learning rates, betas, decay) stay as configured. Called by all ranks, inside the role's state.

    Args:
        contents: of "model"; "optimizer", which starts anew if absent; and "extra", learning-rate progress and random
            states. The latter are loaded where the tensor and pipeline sizes are those of the checkpoint.
    """
    training, resumes_optimizer = _training(parts), "optimizer" in contents
    wanted = _sharded_state(parts, is_loading=True) if resumes_optimizer else _sharded_models(parts)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if "extra" in contents and common["rng_layout"] == _rng_layout(parts):
        wanted["rng"] = _rng_object(parts.groups)
    for number in range(len(parts.chunks)):
        wanted[f"model{number}"] = _without_extra_states(wanted[f"model{number}"])
    loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(parts.chunks):
        missing, unexpected = chunk.bare.load_state_dict(loaded[f"model{number}"], strict=False)
        assert not unexpected, unexpected
        assert all(_EXTRA_STATE in name for name in missing), missing
    if resumes_optimizer:
        step = _steps_made(common["optimizer"])
        training.optimizer.load_state_dict(_optimizer_state(training, loaded["optimizer"], step))
    else:
        training.optimizer.reload_model_params()
    if "extra" in contents:
        training.scheduler.num_steps = 0
        training.scheduler.step(int(common["num_updates"]))
    if "rng" in wanted:
        set_device_rng_state(loaded["rng"]["device"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def _without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    """Of a model: those are for float8, which nothing here uses, and which layers have one depends on who made them."""
    return {name: value for name, value in state.items() if _EXTRA_STATE not in name}


def _training(parts: EngineParts) -> TrainingParts:
    assert parts.training is not None, "only a role with an optimizer has checkpoints"
    return parts.training


def _sharded_models(parts: EngineParts) -> dict[str, Any]:
    metadata = _metadata(parts)
    return {f"model{n}": chunk.bare.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(parts.chunks)}


def _sharded_state(parts: EngineParts, *, is_loading: bool) -> dict[str, Any]:
    training, models = _training(parts), _sharded_models(parts)
    for inner in chained_optimizers(training.optimizer):
        # A role that has made no step yet, as in the critic's warm-up, has no moments: they are zero.
        inner.init_state_fn(inner.optimizer, inner.config)
    by_parameter = models if len(models) > 1 else {"model": models["model0"]}
    distributed = [each for each in chained_optimizers(training.optimizer) if isinstance(each, DistributedOptimizer)]
    with nullcontext() if is_loading else state_shared_out(distributed, parts.device):
        optimizer = training.optimizer.sharded_state_dict(
            by_parameter, is_loading=is_loading, metadata=_metadata(parts)
        )
    return {**models, "optimizer": optimizer, "num_updates": training.scheduler.num_steps}


def _metadata(parts: EngineParts) -> dict[str, Any]:
    # Without the group megatron asks its global ones, which are not passed down everywhere.
    return {**_FORMAT, "dp_cp_group": parts.groups.dp_cp}


def _live_storages(parts: EngineParts) -> set[int]:
    """Addresses of the memory that training changes in place: what a checkpoint must not refer to."""
    inner = [each.optimizer for each in chained_optimizers(_training(parts).optimizer)]
    tensors = chain(
        (tensor for chunk in parts.chunks for tensor in chain(chunk.bare.parameters(), chunk.bare.buffers())),
        (
            value
            for each in inner
            for state in each.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
        (parameter for each in inner for group in each.param_groups for parameter in group["params"]),
    )
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _optimizer_state(training: TrainingParts, loaded: dict[Any, Any], step: int) -> dict[Any, Any]:
    """What the optimizer takes of a loaded state: its tensors. All but the number of steps made is as configured.

    A model's experts have an optimizer of their own in some layouts only: what else the checkpoint says of optimizers
    may be of one where there are two now, or of two where there is one.
    """
    inner = chained_optimizers(training.optimizer)
    if len(inner) == 1:
        return _inner_state(inner[0], {key: value for key, value in loaded.items() if not isinstance(key, int)}, step)
    return {number: _inner_state(each, loaded[number], step) for number, each in enumerate(inner)}


def _inner_state(inner: Any, loaded: dict[str, Any], step: int) -> dict[str, Any]:
    current = inner.state_dict()
    state = {"param_state_sharding_type": _FORMAT["distrib_optim_sharding_type"], **loaded}
    if "param_groups" in current:
        state["param_groups"] = _at_step(current["param_groups"], step)
    else:
        groups = _at_step(current["optimizer"]["param_groups"], step)
        state["optimizer"] = {**loaded.get("optimizer", {}), "param_groups": groups}
    return state


def _at_step(groups: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [{**group, "step": step} for group in groups]


def _steps_made(saved: dict[Any, Any]) -> int:
    """By a saved optimizer or by each of several."""
    if "param_groups" in saved:
        return max(int(group.get("step", 0)) for group in saved["param_groups"])
    return max((_steps_made(each) for each in saved.values() if isinstance(each, dict)), default=0)


def _rng_layout(parts: EngineParts) -> dict[str, int]:
    return {"tp": parts.layout.tp, "pp": parts.layout.pp}


def _rng_object(groups: ProcessGroupCollection) -> ShardedObject:
    states = {"device": device_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    shape, position = (groups.pp.size(), groups.tp.size()), (groups.pp.rank(), groups.tp.rank())
    return ShardedObject("rng", states, shape, position, replica_id=groups.dp_cp.rank())
