"""Checkpoints of a whole run: begun at a step, written at once or while training goes on, then published."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrl.interfaces import CheckpointError, CheckpointWrite, TrainEngine
from mrl.parallel.agreement import broadcast_result, gather_results
from mrl.trainer.checkpoint_files import ENGINE_STATE, HUGGING_FACE, LOOP_STATE
from mrl.trainer.checkpoint_store import CheckpointStore, explain_failure, scratch_of
from mrl.trainer.damage import verify_with_tensors
from mrl.trainer.manifest import FileRecord, Manifest, RoleRecord, record_files
from mrl.trainer.resume import ResumePoint, checkpoint_folder

logger = logging.getLogger(__name__)

Files = dict[str, FileRecord]


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
    copy_model_files: Callable[[Path], None]
    """Puts configuration, tokenizer and generation settings into a folder."""
    exports_hugging_face: bool = False
    """Write the weights beside them, too."""
    async_save: bool = False
    """Write this role's files while training goes on."""
    load_contents: Sequence[str] = ("model", "optimizer", "extra")


@dataclass(kw_only=True)
class _Unpublished:
    """A checkpoint whose files are being written."""

    folder: Path
    state: LoopState
    begin: float
    waited_s: float = 0.0
    """How long training stood still for it."""
    writes: list[CheckpointWrite] = field(default_factory=list)
    """Of all roles, to be finished once all ranks have written."""
    written: Files = field(default_factory=dict)
    """All ranks' files that training waited for."""
    files: list[Future[Files]] = field(default_factory=list)
    """Those of this rank that are left to the background."""

    def collect_files(self) -> Files:
        """Wait for this rank's files; raises what went wrong with the first that failed, after all have ended."""
        errors = [error for future in self.files if (error := future.exception())]
        if errors:
            raise errors[0]
        return {name: record for future in self.files for name, record in future.result().items()}

    def is_written(self) -> bool:
        """Whether this rank's files are written, or have failed."""
        return all(future.done() for future in self.files)


@dataclass(kw_only=True)
class Checkpointer:
    """Saves and loads a run's state. Every method but `close` is called by all ranks with the same arguments."""

    root: Path
    roles: Mapping[str, CheckpointedRole]
    save_freq: int
    """Steps between checkpoints; at most 0 is never."""
    total_steps: int
    _pending: _Unpublished | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._store = CheckpointStore(
            root=self.root, limits={name: role.max_to_keep for name, role in self.roles.items()}
        )
        # A thread is enough: writing, checksums and waiting for the disk all happen outside Python's lock.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        return self.save_freq > 0 and (step % self.save_freq == 0 or step == self.total_steps)

    def save(self, state: LoopState) -> None:
        """Write a checkpoint, or begin to if a role saves asynchronously, after an earlier one is published.

        It appears under its name only when all of it is on the disk; killed at any moment, the run leaves the
        checkpoints before it as they are.

        Raises:
            CheckpointError: this or the earlier one could not be written; on all ranks. Training can go on.
        """
        self._wait_for_earlier(state.step)
        begin = time.perf_counter()
        folder = checkpoint_folder(self.root, state.step)
        pending = _Unpublished(folder=folder, state=state, begin=begin)
        try:
            broadcast_result(lambda: self._begin(folder, state))
            self._write_roles(pending)
        except CheckpointError:
            gather_results(lambda: wait(pending.files) and None)
            self._discard(folder)
            raise
        pending.waited_s = time.perf_counter() - begin
        self._pending = pending
        if not pending.files:
            self.finish()

    def publish_if_written(self) -> None:
        """Publish the checkpoint that is being written, if there is one and all ranks' files are done.

        Raises:
            CheckpointError: as `finish`.
        """
        pending = self._pending
        if pending is not None and all(gather_results(pending.is_written)):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it.

        Raises:
            CheckpointError: it could not be written, and nothing of it is left; on all ranks. Training can go on.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        begin = time.perf_counter()
        try:
            files = pending.written | _merge(gather_results(pending.collect_files))
            for write in pending.writes:
                write.finish()
            num_bytes = broadcast_result(lambda: self._publish(pending, files))
        except Exception:
            self._discard(pending.folder)
            raise
        now = time.perf_counter()
        logger.info(
            "checkpoint %s: %.3f GiB in %.1f s, training waited %.1f s",
            pending.folder,
            num_bytes / 2**30,
            now - pending.begin,
            pending.waited_s + now - begin,
        )

    def close(self) -> None:
        """Give up a checkpoint that is still being written; for a run that ends early. The next run removes it."""
        if self._pending is not None:
            logger.warning("checkpoint %s was not complete and is given up", self._pending.folder)
            self._pending = None
        self._writer.shutdown(wait=False, cancel_futures=True)

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
        mine = _share_of(manifest.files)
        gather_results(lambda: verify_with_tensors(folder, manifest.files, mine))
        for name, role in self.roles.items():
            role.engine.load_checkpoint(folder / name / ENGINE_STATE, role.load_contents)
            role.engine.offload()
        state = LoopState(**json.loads((folder / LOOP_STATE).read_text(encoding="utf-8")))
        logger.info("resumed from %s in %.1f s", point, time.perf_counter() - begin)
        return state

    def _wait_for_earlier(self, step: int) -> None:
        pending = self._pending
        if pending is not None and not all(gather_results(pending.is_written)):
            logger.warning(
                "the checkpoint of step %d waits for that of step %d, which is still being written; with a larger "
                "trainer.save_freq or a faster disk it would not",
                step,
                pending.state.step,
            )
        self.finish()

    def _begin(self, folder: Path, state: LoopState) -> None:
        num_bytes = sum(role.record.num_bytes for role in self.roles.values())
        subfolders = [f"{name}/{part}" for name in self.roles for part in (ENGINE_STATE, HUGGING_FACE)]
        scratch = self._store.begin(folder, num_bytes=num_bytes, subfolders=subfolders)
        with explain_failure(folder):
            (scratch / LOOP_STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
            for name, role in self.roles.items():
                role.copy_model_files(scratch / name / HUGGING_FACE)

    def _write_roles(self, pending: _Unpublished) -> None:
        """Take every role's state; what is not left to the background is written before the next role's is taken."""
        folder = pending.folder
        for name, role in self.roles.items():
            for write in _stage(role, scratch_of(folder) / name):
                pending.writes.append(write)
                task = partial(_write, folder, write)
                if role.async_save:
                    pending.files.append(self._writer.submit(task))
                else:
                    pending.written |= _merge(gather_results(task))
            # Roles take turns here, too: the optimizers of all of them need not fit at once.
            role.engine.offload()

    def _publish(self, pending: _Unpublished, files: Files) -> int:
        roles = {name: role.record for name, role in self.roles.items()}
        state = pending.state
        manifest = Manifest(step=state.step, weight_version=state.weight_version, roles=roles, files=files)
        published = self._store.publish(pending.folder, manifest)
        return sum(file.num_bytes for file in published.files.values())

    def _discard(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            self._store.discard(folder)


def _stage(role: CheckpointedRole, folder: Path) -> Iterator[CheckpointWrite]:
    yield role.engine.stage_checkpoint(folder / ENGINE_STATE, in_background=role.async_save)
    if role.exports_hugging_face:
        yield role.engine.stage_hugging_face(folder / HUGGING_FACE, in_background=role.async_save)


def _write(folder: Path, write: CheckpointWrite) -> Files:
    """Write a role's files on this rank; returns their records."""
    scratch = scratch_of(folder)
    with explain_failure(folder):
        return record_files(scratch, [str(path.relative_to(scratch)) for path in write.write()])


def _merge(shares: Iterable[Files]) -> Files:
    return {name: record for share in shares for name, record in share.items()}


def _share_of(files: Mapping[str, FileRecord]) -> list[str]:
    """This rank's share of the files, by size: neighbours in that order are about equal."""
    by_size = sorted(files, key=lambda name: (files[name].num_bytes, name))
    return by_size[dist.get_rank() :: dist.get_world_size()]
