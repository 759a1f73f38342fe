"""Roles that are built, trained, saved and exported on every rank: what the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron_reference import OPTIMIZER, TEMPERATURE, make_batch, policy_loss, value_loss

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.interfaces import CheckpointWrite
from mrl.parallel.agreement import gather_results
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit

VOCAB = 250


def engine_of(
    path: str,
    kind: str,
    axes: dict[str, Any],
    *,
    distributed: bool,
    optimizer: OptimizerSettings = OPTIMIZER,
) -> MegatronEngine:
    """A role with the folder's weights, in a layout of all ranks."""
    return build_engine(
        RoleSetup(
            kind=kind,
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=dist.get_world_size(), **axes),
            temperature=TEMPERATURE,
            optimizer=optimizer,
            data_parallel=DataParallelSettings(use_distributed_optimizer=distributed),
            packed="cp" in axes,
        )
    )


def update(engine: MegatronEngine, kind: str, *seeds: int) -> list[dict[str, float]]:
    """One optimizer step for each seed's batch; its metrics."""
    loss = policy_loss if kind == "actor" else value_loss
    batches = [make_batch(VOCAB, 5, seed=seed) for seed in seeds]
    return [engine.update(b, loss(b), limit=MicroBatchLimit(samples=2), with_entropy=kind == "actor") for b in batches]


def new_folder(folder: Path) -> Path:
    """Make the folder, once for all ranks."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def write_out(write: CheckpointWrite) -> None:
    """Write what was staged. Called by all ranks."""
    gather_results(write.write)
    write.finish()


def save(engine: MegatronEngine, folder: Path) -> None:
    """Write the role's checkpoint into the empty folder."""
    write_out(engine.stage_checkpoint(folder, in_background=False))


def export_model(engine: MegatronEngine, folder: Path) -> None:
    """Write the role's weights as Hugging Face files into the folder."""
    write_out(engine.stage_hugging_face(folder, in_background=False))
