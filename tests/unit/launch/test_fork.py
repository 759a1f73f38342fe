"""Ranks forked on one host: results, failures and what is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mrl.launch.fork import RankFailure, run_ranks


def test_results_come_in_rank_order():
    assert run_ranks(lambda env: (env.rank, env.world_size, os.environ["RANK"]), 3) == [
        (0, 3, "0"),
        (1, 3, "1"),
        (2, 3, "2"),
    ]


def test_a_user_error_is_reported_without_traceback_and_stops_the_others():
    def main(env):
        if env.rank == 1:
            raise ValueError("batch size 3 does not divide 4")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"^batch size 3 does not divide 4$") as caught:
        run_ranks(main, 3)
    assert caught.value.rank == 1
    assert caught.value.user_error
    assert time.monotonic() - start < 40


def test_the_cause_is_reported_rather_than_the_connections_it_broke():
    def main(env):
        if env.rank == 0:
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        time.sleep(0.1)
        raise KeyError("the real cause")

    with pytest.raises(RankFailure, match="the real cause"):
        run_ranks(main, 2)


def test_a_killed_rank_is_named_with_its_signal():
    def main(env):
        if env.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankFailure, match="rank 2 died with exit status -9"):
        run_ranks(main, 3)


def test_ranks_that_do_not_end_in_time_are_named():
    def main(env):
        if env.rank:
            time.sleep(60)

    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not end within 1 s"):
        run_ranks(main, 3, timeout_s=1)


SLEEPING_PARENT = r"""
import os, signal, sys, time
from mrl.launch.fork import run_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this one
def main(env):
    os.write(1, b"%d\n" % os.getpid())  # one write, so that lines do not mix
    time.sleep(60)
try:
    run_ranks(main, 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_no_rank_outlives_its_parent(sent, status):
    with subprocess.Popen([sys.executable, "-c", SLEEPING_PARENT], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            children = [int(parent.stdout.readline()) for _ in range(2)]
            parent.send_signal(sent)
            assert parent.wait(timeout=50) == status
        finally:
            parent.kill()
    deadline = time.monotonic() + 20
    while any(_is_running(child) for child in children):
        assert time.monotonic() < deadline, "a rank outlived its parent"
        time.sleep(0.05)


INTERRUPTED_PARENT = r"""
import os, signal, sys, time
from mrl.launch.fork import run_ranks
os.register_at_fork(after_in_parent=lambda: time.sleep(0.3))  # a rank is heard of before its fork returns
def main(env):
    if env.rank == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
try:
    run_ranks(main, 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_signal_in_the_middle_of_a_fork_stops_that_rank_too():
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", INTERRUPTED_PARENT], timeout=55, check=False).returncode == 130
    assert time.monotonic() - start < 40


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
