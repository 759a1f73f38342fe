"""Writing checkpoints: killed at every system call, out of space, pruned. One rank, roles of a few bytes."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from test_manifest import record

from mrl.interfaces import CheckpointError
from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer, LoopState
from mrl.trainer.manifest import verify_files
from mrl.trainer.resume import CurrentRole, checkpoint_root, find_resume_point, list_checkpoints

_FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


@dataclass
class Number:
    """A role whose whole state is one number, in one file, beside one that the ranks write together."""

    value: int = 0
    gate: threading.Event | None = None
    """Writing waits for it."""
    is_away: bool = False

    def offload(self):
        self.is_away = True

    def stage_checkpoint(self, folder, *, in_background):
        self.is_away = False
        return NumberWrite(folder, self.value if in_background else self, self.gate)

    def load_checkpoint(self, folder, contents):
        digits = (folder / "value").read_text()
        assert (folder / "index").read_text() == "value"
        self.value = int(digits[: len(digits) // 1000])


@dataclass
class NumberWrite:
    folder: Path
    source: int | Number
    gate: threading.Event | None

    def write(self):
        if self.gate is not None:
            assert self.gate.wait(60)
        value = self.source
        if isinstance(value, Number):
            assert not value.is_away
            value = value.value
        (self.folder / "value").write_text(str(value) * 1000)
        return [self.folder / "value"]

    def finish(self):
        (self.folder / "index").write_text("value")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def copy_model_files(folder):
    (folder / "config.json").write_text("{}")


def build(run_dir, *, keep_actor=None, keep_critic=None, save_freq=1, total_steps=9, async_save=(), gate=None):
    roles = {
        name: CheckpointedRole(
            engine=Number(gate=gate if name in async_save else None),
            record=record(is_critic=name == "critic"),
            max_to_keep=keep,
            copy_model_files=copy_model_files,
            async_save=name in async_save,
        )
        for name, keep in (("actor", keep_actor), ("critic", keep_critic))
    }
    return Checkpointer(root=checkpoint_root(run_dir), roles=roles, save_freq=save_freq, total_steps=total_steps)


def begin_save(checkpointer, step):
    for role in checkpointer.roles.values():
        role.engine.value = step
    checkpointer.save(LoopState(step=step, weight_version=step, prompts={"batch": step}, kl_controller={}))
    for role in checkpointer.roles.values():
        role.engine.value = -1


def save(checkpointer, step):
    begin_save(checkpointer, step)
    checkpointer.finish()


def newest(run_dir):
    """Step of the checkpoint that the next run would continue, after loading all of it."""
    checkpointer = build(run_dir)
    roles = {name: CurrentRole(record=role.record, model_files={}) for name, role in checkpointer.roles.items()}
    point = find_resume_point("auto", run_dir, None, roles)
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
    assert all(role.engine.is_away for role in checkpointer.roles.values()), "one role's state waits for the other's"


def test_only_the_newest_of_each_role_are_kept(tmp_path, one_rank):
    checkpointer = build(tmp_path, keep_actor=1, keep_critic=2)
    for step in (1, 2, 3):
        save(checkpointer, step)
    kept = {path.name: sorted(p.name for p in path.iterdir() if p.is_dir()) for path in checkpointer.root.glob("g*")}
    assert kept == {"global_step_2": ["critic"], "global_step_3": ["actor", "critic"]}
    assert newest(tmp_path) == 3


def test_an_asynchronous_save_is_of_its_step_and_appears_once_it_is_written(tmp_path, one_rank):
    gate = threading.Event()
    checkpointer = build(tmp_path, async_save=("actor",), gate=gate)
    begin_save(checkpointer, 1)
    checkpointer.publish_if_written()
    assert list_checkpoints(checkpointer.root) == []
    gate.set()
    checkpointer.finish()
    assert newest(tmp_path) == 1
    checkpointer.publish_if_written()


def test_a_written_checkpoint_is_published_at_a_later_step(tmp_path, one_rank):
    checkpointer = build(tmp_path, async_save=("actor", "critic"))
    begin_save(checkpointer, 1)
    for _ in range(1000):
        checkpointer.publish_if_written()
        if list_checkpoints(checkpointer.root):
            break
        time.sleep(0.01)
    assert newest(tmp_path) == 1


def test_a_second_save_waits_for_the_first_and_says_so(tmp_path, one_rank, caplog):
    gate = threading.Event()
    checkpointer = build(tmp_path, async_save=("actor", "critic"), gate=gate)
    begin_save(checkpointer, 1)
    threading.Timer(0.05, gate.set).start()
    begin_save(checkpointer, 2)
    assert "checkpoint of step 2 waits for that of step 1" in caplog.text
    assert newest(tmp_path) == 1
    checkpointer.finish()
    assert newest(tmp_path) == 2


def test_a_failure_in_the_background_is_raised_at_the_next_save_and_leaves_nothing(tmp_path, one_rank):
    gate = threading.Event()
    checkpointer = build(tmp_path, async_save=("critic",), gate=gate)
    begin_save(checkpointer, 3)
    shutil.rmtree(checkpointer.root / "global_step_3.saving/critic")
    gate.set()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint \S+/global_step_3: .*critic.*Free space"):
        begin_save(checkpointer, 4)
    assert not list(checkpointer.root.glob("*.saving"))
    save(checkpointer, 5)
    assert newest(tmp_path) == 5


def test_a_run_that_ends_early_gives_up_what_is_not_complete(tmp_path, one_rank, caplog):
    gate = threading.Event()
    checkpointer = build(tmp_path, async_save=("actor",), gate=gate)
    begin_save(checkpointer, 1)
    checkpointer.close()
    gate.set()
    assert "global_step_1 was not complete" in caplog.text
    assert list_checkpoints(checkpointer.root) == []


def test_a_new_run_has_nothing_to_load(tmp_path, one_rank):
    assert build(tmp_path).load(None) is None


def find_save_and_die(run_dir, step, deadly_event, async_save):
    """In a child: the newest checkpoint's step, then a save that dies at its n-th system call on files; did it die?"""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        os.write(writer, str(newest(run_dir)).encode())
        checkpointer, count = build(run_dir, keep_actor=1, keep_critic=1, async_save=async_save), 0

        def die(event, arguments):
            nonlocal count
            if event in _FILE_EVENTS and str(run_dir) in str(arguments):
                count += 1
                if count == deadly_event:
                    os._exit(7)

        sys.addaudithook(die)
        save(checkpointer, step)
        os._exit(0)
    os.close(writer)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with os.fdopen(reader) as pipe:
        return int(pipe.read()), died


@pytest.mark.parametrize("async_save", [(), ("actor", "critic")], ids=len)
def test_killed_at_any_moment_the_last_complete_checkpoint_is_found(tmp_path, async_save):
    make_first(tmp_path)
    found, died, deadly_event = [], True, 0
    while died:
        deadly_event += 1
        step = deadly_event + 1
        newest_step, died = find_save_and_die(tmp_path, step, deadly_event, async_save)
        found.append(newest_step)
        # What was being saved when the last child died, or what that one found.
        assert deadly_event == 1 or found[-1] in (found[-2], deadly_event), deadly_event
    # Some deaths came before the checkpoint was published and some, while older ones were removed, after it.
    assert deadly_event > 20
    assert len(set(found)) > 2
    last, _ = find_save_and_die(tmp_path, 1000, 1, async_save)
    assert last == step


def make_first(run_dir):
    child = os.fork()
    if child == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        save(build(run_dir), 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("async_save", [(), ("actor", "critic")], ids=len)
@pytest.mark.parametrize("limit", [10, 500, 1500])
def test_a_file_that_cannot_be_written_leaves_older_checkpoints_and_the_run_alone(
    tmp_path, one_rank, limit, async_save
):
    checkpointer = build(tmp_path, async_save=async_save)
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
