"""Finding what to resume from, and what becomes of an earlier run's files. No process group, no engine."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mrl.interfaces import CheckpointError
from mrl.trainer.checkpoint_files import HUGGING_FACE, LATEST, MANIFEST
from mrl.trainer.manifest import (
    Manifest,
    RoleRecord,
    check_role,
    compare_files,
    compare_packages,
    read_manifest,
    write_durably,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"global_step_(\d+)$")


@dataclass(kw_only=True, frozen=True)
class CurrentRole:
    """A role as it is configured now."""

    record: RoleRecord
    model_files: Mapping[str, Path]
    """What a checkpoint carries beside the weights, by name there: tokenizer, generation settings."""


@dataclass(kw_only=True, frozen=True)
class ResumePoint:
    """The checkpoint that a run continues."""

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        return f"step {self.manifest.step} of {self.folder}"


def checkpoint_root(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_folder(root: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return root / f"global_step_{step}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint under `root`, oldest first, without those still being written."""
    if not root.is_dir():
        return []
    matches = ((_NAME.match(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and (path / MANIFEST).is_file())


def find_resume_point(
    mode: str, run_dir: Path, resume_from_path: str | None, roles: Mapping[str, CurrentRole]
) -> ResumePoint | None:
    """The checkpoint to continue under `trainer.resume_mode`, checked against the roles as they are configured now.

    Raises:
        CheckpointError: it is incomplete, its manifest is damaged, or it belongs to other models.
    """
    if mode == "disable":
        return None
    if mode == "resume_path":
        assert resume_from_path is not None, "the configuration requires it"
        folder = Path(resume_from_path).expanduser().absolute()
        point = ResumePoint(folder=folder, manifest=read_manifest(folder))
    else:
        newest = _newest_complete(checkpoint_root(run_dir), roles)
        if newest is None:
            return None
        point = newest
    _check(point, roles)
    return point


def _newest_complete(root: Path, roles: Iterable[str]) -> ResumePoint | None:
    """The newest checkpoint of which no role has been removed."""
    for _, folder in reversed(list_checkpoints(root)):
        manifest = read_manifest(folder)
        if all((folder / role).is_dir() or role not in manifest.roles for role in roles):
            return ResumePoint(folder=folder, manifest=manifest)
    return None


def _check(point: ResumePoint, roles: Mapping[str, CurrentRole]) -> None:
    folder, manifest = point.folder, point.manifest
    for role, current in roles.items():
        if role not in manifest.roles:
            raise CheckpointError(
                f"checkpoint {folder} was written by a run without {role}; set trainer.resume_mode=disable or another "
                "trainer.default_local_dir to start anew"
            )
        if not (folder / role).is_dir():
            raise CheckpointError(
                f"checkpoint {folder} no longer has its {role}, which trainer.max_{role}_ckpt_to_keep removed; "
                "choose a newer one"
            )
        check_role(role, manifest.roles[role], current.record, folder)
        prefix = f"{role}/{HUGGING_FACE}/"
        if changed := compare_files(manifest, prefix, current.model_files):
            logger.warning("the %s's %s differ from those that %s was trained with", role, ", ".join(changed), folder)
    if changed := compare_packages(manifest):
        logger.warning("the checkpoint was written with other versions: %s", ", ".join(changed))


def set_aside_history(run_dir: Path, resume: ResumePoint | None) -> None:
    """Move what does not belong to the run that begins out of its way: metrics and checkpoints past its first step.

    Nothing is deleted. Called once per job, before any rank writes.
    """
    stamp = _unused_stamp(run_dir)
    root = checkpoint_root(run_dir)
    within = resume is not None and resume.folder.parent == root
    step = resume.manifest.step if resume is not None and within else -1
    _set_aside_metrics(run_dir, step, stamp)
    later = [folder for number, folder in list_checkpoints(root) if number > step]
    if later:
        aside = run_dir / f"checkpoints.{stamp}"
        aside.mkdir()
        for folder in later:
            folder.rename(aside / folder.name)
        _name_latest(root)
        logger.info("%d checkpoints that this run does not continue are kept in %s", len(later), aside)


def _name_latest(root: Path) -> None:
    remaining = list_checkpoints(root)
    if remaining:
        write_durably(root / LATEST, remaining[-1][1].name + "\n")
    else:
        (root / LATEST).unlink(missing_ok=True)


def _unused_stamp(run_dir: Path) -> str:
    """The time, with a number behind it where two runs begin in the same second."""
    stamp = now = time.strftime("until-%Y%m%d-%H%M%S")
    number = 1
    while any(run_dir.glob(f"*.{stamp}*")):
        number += 1
        stamp = f"{now}-{number}"
    return stamp


def _set_aside_metrics(run_dir: Path, step: int, stamp: str) -> None:
    """Keep the rows up to `step` (-1 is none) and move the file elsewhere if there are others."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) == len(lines) and kept:
        return
    older = run_dir / f"metrics.{stamp}.jsonl"
    path.rename(older)
    logger.info("metrics that this run does not continue are kept as %s", older)
    if kept:
        path.write_text("".join(kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        # The last line of a run that was killed while it wrote.
        return float("inf")
