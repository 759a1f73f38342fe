"""Ranks that die are started again; errors that name what to change are not."""

import os
import signal

import pytest
import torch.distributed as dist

from mrl.launch.addresses import LOOPBACK
from mrl.launch.board import Failure, FailureBoard, is_echo
from mrl.launch.environment import host_environments
from mrl.launch.restart import RunFailed, run_with_restarts
from mrl.launch.store import serve_store


def run(rank_main, *, max_restarts):
    """What ranks return, and how often they were started."""
    builds = []

    def build():
        builds.append(1)
        return rank_main

    with serve_store(LOOPBACK) as port:
        ranks = host_environments(num_nodes=1, ranks_per_node=2, master_addr=LOOPBACK, master_port=port)
        try:
            result = run_with_restarts(build, ranks, max_restarts=max_restarts, user_errors=(ValueError,))
        except RunFailed as failure:
            result = str(failure)
    return result, len(builds)


def die_in_attempts(*attempts):
    def main(env):
        if env.rank == 1 and env.attempt in attempts:
            os.kill(os.getpid(), signal.SIGKILL)
        return env.attempt

    return main


def test_a_killed_rank_has_all_ranks_started_again():
    assert run(die_in_attempts(0, 1), max_restarts=2) == ([2, 2], 3)


def test_too_many_deaths_end_the_run_with_the_last():
    text, builds = run(die_in_attempts(0, 1), max_restarts=1)
    assert text.startswith("rank 1: rank 1 died with exit status -9")
    assert builds == 2


def test_an_error_of_the_user_is_not_repeated():
    def main(env):
        if env.rank == 0:
            raise ValueError("lower the batch size")

    assert run(main, max_restarts=3) == ("rank 0: lower the batch size", 1)


def test_the_first_published_failure_is_the_jobs():
    store = dist.HashStore()
    boards = [FailureBoard(store), FailureBoard(store)]
    assert boards[0].first() is None
    first = Failure(rank=3, kind="died", message="gone")
    assert boards[0].publish(first) == first
    assert boards[1].publish(Failure(rank=1, kind="error", message="Connection closed by peer")) == first
    assert boards[1].first() == first


@pytest.mark.parametrize(
    ("text", "echo"),
    [("[gloo] Connection closed by peer [127.0.0.1]:1", True), ("CUDA error: out of memory", False)],
)
def test_errors_that_follow_from_others_are_told_apart(text, echo):
    assert is_echo(text) == echo
