"""Writing checkpoints: killed at every system call, out of space, pruned. One rank, roles of a few bytes."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import pytest
import torch.distributed as dist
from test_manifest import record

from mrl.interfaces import CheckpointError
from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer, LoopState
from mrl.trainer.manifest import verify_files
from mrl.trainer.resume import checkpoint_root, find_resume_point

_FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


@dataclass
class Number:
    """A role whose whole state is one number, in one file."""

    value: int = 0

    def save_checkpoint(self, folder):
        try:
            (folder / "value").write_text(str(self.value) * 1000)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error

    def load_checkpoint(self, folder):
        digits = (folder / "value").read_text()
        self.value = int(digits[: len(digits) // 1000])


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(run_dir, *, keep_actor=None, keep_critic=None, save_freq=1, total_steps=9):
    roles = {
        name: CheckpointedRole(engine=Number(), record=record(is_critic=name == "critic"), max_to_keep=keep)
        for name, keep in (("actor", keep_actor), ("critic", keep_critic))
    }
    return Checkpointer(root=checkpoint_root(run_dir), roles=roles, save_freq=save_freq, total_steps=total_steps)


def save(checkpointer, step):
    for role in checkpointer.roles.values():
        role.engine.value = step
    checkpointer.save(LoopState(step=step, weight_version=step, prompts={"batch": step}, kl_controller={}))


def newest(run_dir):
    """Step of the checkpoint that the next run would continue, after loading all of it."""
    checkpointer = build(run_dir)
    records = {name: role.record for name, role in checkpointer.roles.items()}
    point = find_resume_point("auto", run_dir, None, records)
    state = checkpointer.load(point)
    assert [role.engine.value for role in checkpointer.roles.values()] == [state.step] * 2
    assert state.prompts == {"batch": state.step}
    return state.step


def test_a_checkpoint_is_due_every_so_many_steps_and_after_the_last(tmp_path):
    due = [step for step in range(1, 10) if build(tmp_path, save_freq=4).is_due(step)]
    assert due == [4, 8, 9]
    assert not build(tmp_path, save_freq=-1).is_due(9)


def test_what_was_saved_is_loaded(tmp_path, one_rank):
    checkpointer = build(tmp_path)
    save(checkpointer, 1)
    save(checkpointer, 2)
    assert newest(tmp_path) == 2
    assert (checkpointer.root / "latest").read_text() == "global_step_2\n"


def test_only_the_newest_of_each_role_are_kept(tmp_path, one_rank):
    checkpointer = build(tmp_path, keep_actor=1, keep_critic=2)
    for step in (1, 2, 3):
        save(checkpointer, step)
    kept = {path.name: sorted(p.name for p in path.iterdir() if p.is_dir()) for path in checkpointer.root.glob("g*")}
    assert kept == {"global_step_2": ["critic"], "global_step_3": ["actor", "critic"]}
    assert newest(tmp_path) == 3


def test_a_new_run_has_nothing_to_load(tmp_path, one_rank):
    assert build(tmp_path).load(None) is None


def save_and_die(run_dir, step, deadly_event):
    """Save in a child that dies at its n-th system call on files; whether it died."""
    child = os.fork()
    if child == 0:
        checkpointer, count = build(run_dir, keep_actor=1, keep_critic=1), 0

        def die(event, arguments):
            nonlocal count
            if event in _FILE_EVENTS and str(run_dir) in str(arguments):
                count += 1
                if count == deadly_event:
                    os._exit(7)

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        sys.addaudithook(die)
        save(checkpointer, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_killed_at_any_moment_the_last_complete_checkpoint_is_found(tmp_path):
    steps, deadly_event, died = iter(range(2, 1000)), 0, True
    assert not save_and_die(tmp_path, 1, 10**9)
    found = []
    while died:
        deadly_event += 1
        step, last = next(steps), found[-1] if found else 1
        died = save_and_die(tmp_path, step, deadly_event)
        found.append(newest_in_child(tmp_path))
        assert found[-1] in ((last, step) if died else (step,)), deadly_event
    # Some deaths came before the checkpoint was published and some, while older ones were removed, after it.
    assert deadly_event > 20
    assert len(set(found)) > 2


def newest_in_child(run_dir):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        os.write(writer, str(newest(run_dir)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return int(pipe.read())


@pytest.mark.parametrize("limit", [10, 500, 1500])
def test_a_file_that_cannot_be_written_leaves_older_checkpoints_and_the_run_alone(tmp_path, one_rank, limit):
    checkpointer = build(tmp_path)
    save(checkpointer, 1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # The system refuses longer files, as it refuses any on a full disk: trainer.json, a role's, or the manifest.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"global_step_2.*File too large.*trainer\.default_local_dir"):
            save(checkpointer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    save(checkpointer, 3)
    assert newest(tmp_path) == 3


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(tmp_path, one_rank):
    checkpointer = build(tmp_path)
    huge = {"a": {"shape": [10**9, 10**9], "dtype": "float32"}}
    object.__setattr__(checkpointer.roles["actor"].record, "tensors", huge)
    with pytest.raises(CheckpointError, match=r"needs at least .* GiB, but only .* GiB are free"):
        save(checkpointer, 1)
    assert list(checkpointer.root.iterdir()) == []


def test_damage_to_any_file_is_noticed(tmp_path, one_rank):
    checkpointer = build(tmp_path)
    save(checkpointer, 1)
    point = find_resume_point("auto", tmp_path, None, {})
    for name in point.manifest.files:
        path = point.folder / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            checkpointer.load(point)
        path.write_bytes(data)
    verify_files(point.folder, point.manifest.files)
