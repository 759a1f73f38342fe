"""Two runs in one folder, each a process."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from mrl.trainer.run_folder import claim_run_folder

FORK = multiprocessing.get_context("fork")


def hold(folder, pipe):
    with claim_run_folder(folder):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder, and the pipe that ends it."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, holder):
    process, _ = holder
    message = rf"another run, process {process.pid} on \S+, is writing to \S+/run; .*trainer\.default_local_dir"
    with pytest.raises(ValueError, match=message), claim_run_folder(tmp_path / "run", patience_s=0):
        pass
    with claim_run_folder(tmp_path / "another", patience_s=0):
        pass


def test_a_run_waits_for_one_that_is_ending(tmp_path, holder):
    _, pipe = holder
    pipe.send("end")
    with claim_run_folder(tmp_path / "run", patience_s=60):
        pass


def test_a_killed_run_leaves_no_claim(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with claim_run_folder(tmp_path / "run", patience_s=0):
        pass


def test_a_claim_ends_although_a_forked_process_lives_on(tmp_path):
    reader, writer = os.pipe()
    with claim_run_folder(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    with claim_run_folder(tmp_path / "run", patience_s=0):
        pass
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)
