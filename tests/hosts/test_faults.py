"""What the tasks of several hosts do about ranks and hosts that fail. The ranks do nothing but wait for each other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrl.launch.environment import RankEnvironment
from mrl.launch.hosts import join_job
from mrl.launch.rendezvous import init_process_group
from mrl.launch.restart import RunFailed, run_with_restarts
from mrl.launch.task import Task
from mrl.launch.watchdog import Deadlines, Patience, Watchdog

RANKS_PER_HOST = 2
DEADLINE_S = 2.0
STUCK_S = 9.0

Fault = Callable[[RankEnvironment], None]


def no_fault(env: RankEnvironment) -> None:
    """Go on to the next barrier."""


class Cluster:
    """A job on some hosts: every rank passes a barrier, then `fault`, then another barrier."""

    def __init__(self, hosts: Any, folder: Path, fault: Fault, *, max_restarts: int = 0) -> None:
        self._hosts, self._folder, self._fault, self._max_restarts = hosts, folder, fault, max_restarts
        self.tasks = [
            hosts.start(index, lambda index=index: self._task(index), folder / f"log{index}")
            for index in range(len(hosts.names))
        ]

    def wait_until_all_met(self) -> None:
        """Until every rank is past the first barrier."""
        deadline = time.monotonic() + 60
        ranks = len(self.tasks) * RANKS_PER_HOST
        while len(list(self._folder.glob("met*"))) < ranks:
            assert time.monotonic() < deadline, [task.output() for task in self.tasks]
            time.sleep(0.05)

    def _task(self, index: int) -> int:
        hosts = self._hosts
        task = Task(
            index=index,
            count=len(hosts.names),
            local_index=0,
            node_rank=index,
            master_addr=hosts.addresses[0],
            master_port=4100,
            host_address=hosts.addresses[index],
            owns_host=True,
        )
        timeout = timedelta(seconds=60)
        with join_job(
            task, num_nodes=len(hosts.names), ranks_per_node=RANKS_PER_HOST, interface=None, timeout=timeout
        ) as job:
            try:
                run_with_restarts(
                    lambda: self._rank, job.ranks, max_restarts=self._max_restarts, user_errors=(ValueError,)
                )
            except RunFailed as failure:
                os.write(1, f"task {index}: {failure}\n".encode())
                return 1
            job.leave()
        return 0

    def _rank(self, env: RankEnvironment) -> None:
        watchdog = Watchdog(
            env,
            Deadlines(default_s=60.0, of_phase_s={"reward": DEADLINE_S}),
            run_dir=self._folder,
            patience=Patience(peer_s=2.0, gather_s=4.0, stuck_s=STUCK_S),
        )
        with watchdog:
            init_process_group(env, backend="gloo", timeout=timedelta(seconds=120))
            watchdog.start()
            dist.barrier()
            (self._folder / f"met{env.rank}").touch()
            self._fault(env)
            watchdog.enter("reward")
            dist.barrier()


def test_a_ranks_own_error_ends_all_hosts(make_hosts, tmp_path):
    def fault(env: RankEnvironment) -> None:
        if env.rank == 3:
            raise ValueError("lower the batch size")

    tasks = Cluster(make_hosts(2), tmp_path, fault, max_restarts=1).tasks
    assert [task.wait(60) for task in tasks] == [1, 1]
    for index, task in enumerate(tasks):
        assert f"task {index}: rank 3: lower the batch size" in task.output()


def test_a_killed_rank_has_all_hosts_start_again(make_hosts, tmp_path):
    def fault(env: RankEnvironment) -> None:
        if env.rank == 2 and env.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    tasks = Cluster(make_hosts(2), tmp_path, fault, max_restarts=1).tasks
    assert [task.wait(60) for task in tasks] == [0, 0], [task.output() for task in tasks]


def test_a_lost_host_is_named_by_those_that_wait_for_it(make_hosts, tmp_path):
    def fault(env: RankEnvironment) -> None:
        if env.node_rank == 1:
            time.sleep(200)

    hosts = make_hosts(2)
    cluster = Cluster(hosts, tmp_path, fault)
    cluster.wait_until_all_met()
    # Without the cable first, its kernel would still close the connections.
    hosts.set_link(1, "down")
    hosts.shut_down(1)
    assert cluster.tasks[0].wait(60) == 1
    [report] = tmp_path.glob("hang-*.txt")
    text = report.read_text()
    for rank in (2, 3):
        assert f"rank {rank} is silent: its process, or its host, does not answer" in text
    assert "2 ranks (0, 1) are waiting in barrier" in text
    assert hosts.processes(0) == []


def test_both_sides_of_a_partition_end(make_hosts, tmp_path):
    hosts = make_hosts(2)
    unplugged = tmp_path / "unplugged"

    def fault(env: RankEnvironment) -> None:
        while not unplugged.exists():
            time.sleep(0.05)

    cluster = Cluster(hosts, tmp_path, fault)
    cluster.wait_until_all_met()
    hosts.set_link(1, "down")
    unplugged.touch()
    assert [task.wait(90) for task in cluster.tasks] == [1, 1]
    [report] = tmp_path.glob("hang-*.txt")
    assert "rank 2 is silent: its process, or its host, does not answer" in report.read_text()
    assert [hosts.processes(index) for index in range(2)] == [[], []]
