"""A run's checkpoints on the disk: begun beside their final place, published by one rename, removed when outdated.

One rank calls this; it knows nothing of others. Every OSError comes out as a CheckpointError that says what to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mrl.interfaces import CheckpointError
from mrl.trainer.checkpoint_files import LATEST
from mrl.trainer.manifest import (
    Manifest,
    list_files,
    record_files,
    sync_folder,
    write_durably,
    write_manifest,
)
from mrl.trainer.resume import list_checkpoints

REMEDY = (
    "Free space, lower trainer.max_actor_ckpt_to_keep and trainer.max_critic_ckpt_to_keep, or set "
    "trainer.default_local_dir to another disk; older checkpoints are untouched"
)
_SAVING, _REMOVED = ".saving", ".removed-"


@contextmanager
def explain_failure(folder: Path) -> Iterator[None]:
    """Raise errors of the block's writing as CheckpointError that names the checkpoint and the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}. {REMEDY}") from error
    except CheckpointError as error:
        if REMEDY in str(error):
            raise
        raise CheckpointError(f"{error}. {REMEDY}") from error


def scratch_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(folder.name + _SAVING)


@dataclass(kw_only=True, frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    root: Path
    limits: Mapping[str, int | None]
    """By role: the newest checkpoints whose part of it is kept; None is all."""

    def begin(self, folder: Path, *, num_bytes: int, subfolders: Iterable[str]) -> Path:
        """A new folder to write in; what earlier runs left unfinished is removed.

        Raises:
            CheckpointError: fewer than `num_bytes` are free, or the checkpoint exists.
        """
        if folder.exists():
            raise CheckpointError(f"checkpoint {folder} exists already; move it away")
        with explain_failure(folder):
            self.root.mkdir(parents=True, exist_ok=True)
            sync_folder(self.root.parent)
            for pattern in (f"*{_SAVING}", f"{_REMOVED}*", f"*/{_REMOVED}*"):
                for leftover in self.root.glob(pattern):
                    shutil.rmtree(leftover)
            free = shutil.disk_usage(self.root).free
            if num_bytes > free:
                raise CheckpointError(
                    f"checkpoint {folder} needs at least {num_bytes / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB "
                    "are free"
                )
            for name in subfolders:
                (scratch_of(folder) / name).mkdir(parents=True)
            return scratch_of(folder)

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Give what was written its name, after all of it is on the disk; then remove what is outdated.

        Args:
            manifest: with the files of all ranks, but those that this one has written since.

        Returns:
            The whole manifest, as it was written.
        """
        scratch = scratch_of(folder)
        with explain_failure(folder):
            rest = [name for name in list_files(scratch) if name not in manifest.files]
            files = dict(sorted({**manifest.files, **record_files(scratch, rest)}.items()))
            manifest = replace(manifest, files=files)
            write_manifest(scratch, manifest)
            for path in scratch.rglob("*"):
                if path.is_dir():
                    sync_folder(path)
            scratch.rename(folder)
            sync_folder(self.root)
            write_durably(self.root / LATEST, folder.name + "\n")
            self._prune()
        return manifest

    def discard(self, folder: Path) -> None:
        """Remove what was begun and will not be completed; what cannot be removed, the next `begin` tries again."""
        shutil.rmtree(scratch_of(folder), ignore_errors=True)

    def _prune(self) -> None:
        """Remove each role's part of checkpoints past its limit, and checkpoints of which no part is left."""
        folders = [folder for _, folder in list_checkpoints(self.root)]
        for name, limit in self.limits.items():
            for folder in folders[:-limit] if limit else []:
                if (folder / name).is_dir():
                    _remove(folder / name)
        for folder in folders:
            if not any((folder / name).is_dir() for name in self.limits):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder; killed half-way it leaves nothing that could be taken for it."""
    doomed = folder.with_name(_REMOVED + folder.name)
    folder.rename(doomed)
    shutil.rmtree(doomed)
