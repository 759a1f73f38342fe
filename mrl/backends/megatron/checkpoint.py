"""Saving and loading one trained role with megatron-core's dist_checkpointing, from any layout into any other.

Tensors are stored by their global name and position, so that tensor, pipeline, virtual-pipeline and data-parallel sizes
may all differ when they are loaded, the optimizer's state included.
"""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core.dist_checkpointing as dist_checkpointing
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as filesystem
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from mrl.backends.megatron.role_state import device_rng_state, set_device_rng_state
from mrl.interfaces import CheckpointError
from mrl.parallel.agreement import gather_results

if TYPE_CHECKING:
    from mrl.backends.megatron.engine import EngineParts, TrainingParts

_FORMAT = {
    # Of the distributed optimizer's formats the one that loads in every layout; the default one is no longer supported.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def save_role(parts: EngineParts, folder: Path) -> None:
    """Write parameters, optimizer, learning-rate progress and random states to `folder`, which exists and is empty.

    Called by all ranks, inside the role's state.

    Raises:
        CheckpointError: a file could not be written; on all ranks. The role's state is unchanged.
    """
    state = _sharded_state(parts, is_loading=False) | {
        "rng_layout": _rng_layout(parts),
        "rng": _rng_object(parts.groups),
    }
    _write_errors.clear()
    try:
        dist_checkpointing.save(state, str(folder), content_metadata=dict(_FORMAT))
    except CheckpointException as error:
        # Raised on all ranks together, but only the coordinator knows what happened where.
        own = _write_errors[-1] if _write_errors else ""
        description = _describe(error)
        reports = gather_results(lambda: (own, description))
        reason = next(filter(None, [report for reports in zip(*reports, strict=True) for report in reports]), "unknown")
        raise CheckpointError(f"cannot write the checkpoint {folder}: {reason}") from error
    except OSError as error:
        # On the coordinator alone, with the other ranks still waiting for it: this rank has to end.
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error


@torch.no_grad()
def load_role(parts: EngineParts, folder: Path) -> None:
    """Fill parameters, optimizer, learning-rate progress and random states from what `save_role` wrote.

    Hyperparameters (learning rates, betas, decay) stay as configured. Random states are loaded where the tensor and
    pipeline sizes are those of the checkpoint, and start anew from the seed otherwise. Called by all ranks, inside the
    role's state.
    """
    training = _training(parts)
    wanted = _sharded_state(parts, is_loading=True)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if common["rng_layout"] == _rng_layout(parts):
        wanted["rng"] = _rng_object(parts.groups)
    loaded = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(parts.chunks):
        chunk.bare.load_state_dict(loaded[f"model{number}"], strict=True)
    _keep_hyperparameters(loaded["optimizer"], training)
    training.optimizer.load_state_dict(loaded["optimizer"])
    training.scheduler.num_steps = 0
    training.scheduler.step(int(loaded["num_updates"]))
    if "rng" in loaded:
        set_device_rng_state(loaded["rng"]["device"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


_write_errors: list[str] = []
"""Of the save in progress, on this rank."""


@functools.wraps(filesystem._write_item)
def _write_whole_item(
    transforms: Any, stream: Any, data: Any, write_item: WriteItem, storage_key: str, **options: Any
) -> Any:
    """Hand a tensor's bytes to the file in one piece.

    `torch.save` into a file on a full disk loses the system's error in its C++ writer, and has crashed in there.
    """
    if isinstance(data, torch.Tensor):
        buffer = io.BytesIO()
        torch.save(data, buffer)
        data, write_item = buffer, replace(write_item, type=WriteItemType.BYTE_IO)
    try:
        result = filesystem._write_item(transforms, stream, data, write_item, storage_key, **options)
        stream.flush()
        return result
    except OSError as error:
        # Megatron reports the error's type only.
        _write_errors.append(f"rank {dist.get_rank()}: {error}")
    # Not the error itself: its frames hold a view of a BytesIO, and Python crashes when it collects such a cycle.
    raise OSError(_write_errors[-1])


setattr(filesystem_async, "_write_item", _write_whole_item)  # noqa: B010


def _training(parts: EngineParts) -> TrainingParts:
    assert parts.training is not None, "only a role with an optimizer has checkpoints"
    return parts.training


def _sharded_state(parts: EngineParts, *, is_loading: bool) -> dict[str, Any]:
    training = _training(parts)
    # Without it megatron asks its global groups, which are not passed down everywhere.
    metadata = {**_FORMAT, "dp_cp_group": parts.groups.dp_cp}
    models = {
        f"model{number}": chunk.bare.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(parts.chunks)
    }
    inner = _inner(training)
    # A role that has made no step yet, as in the critic's warm-up, has no moments: they are zero.
    inner.init_state_fn(inner.optimizer, inner.config)
    by_parameter = models if len(models) > 1 else {"model": models["model0"]}
    optimizer = training.optimizer.sharded_state_dict(by_parameter, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer, "num_updates": training.scheduler.num_steps}


def _inner(training: TrainingParts) -> Any:
    optimizers = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    assert len(optimizers) == 1, f"a dense model has one optimizer, not {len(optimizers)}"
    return optimizers[0]


def _keep_hyperparameters(loaded: dict[str, Any], training: TrainingParts) -> None:
    """Replace the checkpoint's parameter groups with the current ones, but for the number of steps made."""
    holder = loaded if "param_groups" in loaded else loaded["optimizer"]
    step = max(int(group.get("step", 0)) for group in holder["param_groups"])
    current = _inner(training).state_dict()
    groups = (current if "param_groups" in current else current["optimizer"])["param_groups"]
    holder["param_groups"] = [{**group, "step": step} for group in groups]


def _rng_layout(parts: EngineParts) -> dict[str, int]:
    return {"tp": parts.layout.tp, "pp": parts.layout.pp}


def _rng_object(groups: ProcessGroupCollection) -> ShardedObject:
    states = {"device": device_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    shape, position = (groups.pp.size(), groups.tp.size()), (groups.pp.rank(), groups.tp.rank())
    return ShardedObject("rng", states, shape, position, replica_id=groups.dp_cp.rank())


def _describe(error: CheckpointException) -> str:
    """The first failing rank's own message, where this rank was told."""
    failures = error.failures
    if not failures:
        return ""
    rank = min(failures)
    return f"rank {rank}: {failures[rank][0]} (rank {dist.get_rank()} coordinated)"
