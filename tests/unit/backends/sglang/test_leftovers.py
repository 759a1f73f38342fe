"""What removes a process's files when it has ended."""

import multiprocessing
import os
import signal
import time

from mrl.backends.sglang.leftovers import Leftovers


def fork(main):
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def gone(path):
    deadline = time.monotonic() + 10
    while path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_files_and_folders_go_when_a_process_is_killed_and_others_stay(tmp_path):
    file, folder, other = tmp_path / "a name\nof two lines", tmp_path / "folder", tmp_path / "other"

    def main():
        leftovers = Leftovers()
        for path in (tmp_path / "never made", file, folder):
            leftovers.add(path)
        folder.mkdir()
        for path in (folder / "inside", file, other):
            path.write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    process = fork(main)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert gone(file)
    assert gone(folder)
    assert other.exists()


def test_files_stay_while_a_forked_process_may_need_them(tmp_path):
    file, pid = tmp_path / "file", tmp_path / "pid"

    def main():
        leftovers = Leftovers()
        leftovers.add(file)
        file.write_text("x")
        child = os.fork()
        if child == 0:
            time.sleep(60)
        pid.write_text(str(child))
        os._exit(0)

    process = fork(main)
    process.join(10)
    time.sleep(0.3)
    assert process.exitcode == 0
    assert file.exists()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert gone(file)


def test_no_child_is_left_to_the_process(tmp_path):
    def main():
        Leftovers()
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            os._exit(0)
        os._exit(1)

    process = fork(main)
    process.join(10)
    assert process.exitcode == 0
