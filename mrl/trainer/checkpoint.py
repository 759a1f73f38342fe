"""Checkpoints of a whole run: written beside their final place, complete before they are visible."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrl.interfaces import CheckpointError, TrainEngine
from mrl.parallel.agreement import broadcast_result, gather_results
from mrl.trainer.manifest import (
    FileRecord,
    Manifest,
    RoleRecord,
    list_files,
    record_files,
    sync_folder,
    verify_files,
    write_durably,
    write_manifest,
)
from mrl.trainer.resume import ResumePoint, checkpoint_folder, list_checkpoints

logger = logging.getLogger(__name__)

_STATE, _LATEST, _ENGINE_STATE, _HUGGING_FACE = "trainer.json", "latest", "dist_ckpt", "huggingface"
_SAVING, _REMOVED = ".saving", ".removed-"
_REMEDY = (
    "Free space, lower trainer.max_actor_ckpt_to_keep and trainer.max_critic_ckpt_to_keep, or set "
    "trainer.default_local_dir to another disk; older checkpoints are untouched"
)


@dataclass(kw_only=True, frozen=True)
class LoopState:
    """What the training loop itself has to remember; plain values."""

    step: int
    """PPO steps made."""
    weight_version: int
    """Of the weights after the step, which engines pull next."""
    prompts: dict[str, Any]
    """Position in the data."""
    kl_controller: dict[str, float]


@dataclass(kw_only=True, frozen=True)
class CheckpointedRole:
    """A trained role and how its checkpoints are kept."""

    engine: TrainEngine
    record: RoleRecord
    max_to_keep: int | None
    """Newest checkpoints whose part of this role is kept; None is all."""
    finish_export: Callable[[Path], None] | None = None
    """Adds configuration and tokenizer to an exported Hugging Face model; None exports none."""


@dataclass(kw_only=True, frozen=True)
class Checkpointer:
    """Saves and loads a run's state. Every method is called by all ranks with the same arguments."""

    root: Path
    roles: Mapping[str, CheckpointedRole]
    save_freq: int
    """Steps between checkpoints; at most 0 is never."""
    total_steps: int

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        return self.save_freq > 0 and (step % self.save_freq == 0 or step == self.total_steps)

    def save(self, state: LoopState) -> None:
        """Write a checkpoint and remove those that are no longer to be kept.

        It appears under its name only when all of it is on the disk; killed at any moment, the run leaves the
        checkpoints before it as they are.

        Raises:
            CheckpointError: something could not be written; on all ranks. Training can go on.
        """
        begin = time.perf_counter()
        folder = checkpoint_folder(self.root, state.step)
        scratch = folder.with_name(folder.name + _SAVING)
        _on_one_rank(folder, lambda: self._prepare(folder, scratch))
        try:
            for name, role in self.roles.items():
                self._save_role(role, scratch / name)
            _on_one_rank(folder, lambda: self._write_state(scratch, state))
            files = _merge(gather_results(lambda: _reporting(folder, lambda: _record_share(scratch))))
            _on_one_rank(folder, lambda: self._publish(scratch, folder, state, files))
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        size_gib = sum(file.num_bytes for file in files.values()) / 2**30
        logger.info("checkpoint %s: %.3f GiB in %.1f s", folder, size_gib, time.perf_counter() - begin)

    def load(self, point: ResumePoint | None) -> LoopState | None:
        """Fill every role from a checkpoint, if there is one, after verifying its files.

        Raises:
            CheckpointError: a file is missing, cut short or changed, or ranks see other checkpoints; on all ranks,
                before anything is loaded.
        """
        begin = time.perf_counter()
        steps = gather_results(lambda: point.manifest.step if point else None)
        if len(set(steps)) > 1:
            raise CheckpointError(f"the ranks found checkpoints of steps {steps}; give all hosts one shared folder")
        if point is None:
            return None
        folder, manifest = point.folder, point.manifest
        mine = list(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        gather_results(lambda: verify_files(folder, {name: manifest.files[name] for name in mine}))
        for name, role in self.roles.items():
            role.engine.load_checkpoint(folder / name / _ENGINE_STATE)
        state = LoopState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        logger.info("resumed from %s in %.1f s", point, time.perf_counter() - begin)
        return state

    def _prepare(self, folder: Path, scratch: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for pattern in (f"*{_SAVING}", f"{_REMOVED}*", f"*/{_REMOVED}*"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover)
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; move it away")
        needed, free = sum(role.record.num_bytes for role in self.roles.values()), shutil.disk_usage(self.root).free
        if needed > free:
            raise CheckpointError(
                f"checkpoint {folder} needs at least {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are "
                f"free. {_REMEDY}"
            )
        for name, role in self.roles.items():
            (scratch / name / _ENGINE_STATE).mkdir(parents=True)
            if role.finish_export is not None:
                (scratch / name / _HUGGING_FACE).mkdir()

    def _save_role(self, role: CheckpointedRole, folder: Path) -> None:
        finish = role.finish_export
        try:
            role.engine.save_checkpoint(folder / _ENGINE_STATE)
            if finish is not None:
                role.engine.export_hugging_face(folder / _HUGGING_FACE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {_REMEDY}") from error
        if finish is not None:
            _on_one_rank(folder, lambda: finish(folder / _HUGGING_FACE))

    def _write_state(self, scratch: Path, state: LoopState) -> None:
        (scratch / _STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")

    def _publish(self, scratch: Path, folder: Path, state: LoopState, files: dict[str, FileRecord]) -> None:
        roles = {name: role.record for name, role in self.roles.items()}
        manifest = Manifest(step=state.step, weight_version=state.weight_version, roles=roles, files=files)
        write_manifest(scratch, manifest)
        for path in scratch.rglob("*"):
            if path.is_dir():
                sync_folder(path)
        scratch.rename(folder)
        sync_folder(self.root)
        write_durably(self.root / _LATEST, folder.name + "\n")
        self._prune()

    def _prune(self) -> None:
        """Remove each role's part of checkpoints past its limit, and checkpoints of which no part is left."""
        folders = [folder for _, folder in list_checkpoints(self.root)]
        for name, role in self.roles.items():
            outdated = folders[: -role.max_to_keep] if role.max_to_keep else []
            for folder in outdated:
                if (folder / name).is_dir():
                    _remove(folder / name)
        for folder in folders:
            if not any((folder / name).is_dir() for name in self.roles):
                _remove(folder)


def _on_one_rank(folder: Path, work: Callable[[], None]) -> None:
    """Do `work` on one rank; its failure is raised on all of them."""
    broadcast_result(lambda: _reporting(folder, work))


def _reporting[T](folder: Path, work: Callable[[], T]) -> T:
    """The result of `work`, whose OSError becomes a message that names the checkpoint and says what to do."""
    try:
        return work()
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}. {_REMEDY}") from error


def _record_share(folder: Path) -> dict[str, FileRecord]:
    """The records of this rank's share of the files."""
    return record_files(folder, list_files(folder)[dist.get_rank() :: dist.get_world_size()])


def _merge(shares: list[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    merged = {name: record for share in shares for name, record in share.items()}
    return dict(sorted(merged.items()))


def _remove(folder: Path) -> None:
    """Remove a folder; killed half-way it leaves nothing that could be taken for it."""
    doomed = folder.with_name(_REMOVED + folder.name)
    folder.rename(doomed)
    shutil.rmtree(doomed)
