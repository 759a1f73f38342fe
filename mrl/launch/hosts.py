"""How the tasks of a job find each other: the first one serves the job's store, the others learn where."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

from mrl.launch.addresses import LOOPBACK, find_host_address, join_host_port, resolve
from mrl.launch.environment import RankEnvironment, host_environments
from mrl.launch.store import connect_store, serve_store
from mrl.launch.task import Task

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_LEAVE_S = 30.0


@dataclass(kw_only=True, frozen=True)
class Job:
    """A job, as one of its tasks sees it."""

    task: Task
    ranks: Sequence[RankEnvironment]
    """All of this task's host, or the one that it is itself."""
    runs_host: bool

    def leave(self) -> None:
        """Keep the store until no task needs it any more. Called by all tasks that did their part, as the last thing.

        Task 0 goes without those that do not end.
        """
        if self.task.count == 1:
            return
        rank = self.ranks[0]
        store = connect_store(rank.master_addr, rank.master_port, timeout=timedelta(seconds=_LEAVE_S))
        if self.task.index:
            store.add("left", 1)
            return
        deadline = time.monotonic() + _LEAVE_S
        while store.add("left", 0) < self.task.count - 1:
            if time.monotonic() > deadline:
                logger.warning("not all tasks had ended %.0f s after the first; ending without them", _LEAVE_S)
                return
            time.sleep(_POLL_S)


@contextmanager
def join_job(
    task: Task, *, num_nodes: int, ranks_per_node: int, interface: str | None, timeout: timedelta
) -> Iterator[Job]:
    """The job that this task is part of; its store is there until the block ends. Called by every task.

    Task 0 serves the store, on the loopback interface where the job has one host only.

    Args:
        interface: whose address this host has for the others; None finds it.
        timeout: longest wait for the others.

    Raises:
        ValueError: the tasks do not fit the job, no address, or a task that did not come.
    """
    runs_host = task.runs_host(num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    address = LOOPBACK if num_nodes == 1 else _address(task, interface)
    with _job_store(task, address, timeout) as (master_addr, master_port):
        ranks = host_environments(
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            master_addr=master_addr,
            master_port=master_port,
            node_rank=task.node_rank,
            host_address=address,
        )
        yield Job(task=task, ranks=ranks if runs_host else [ranks[task.local_index]], runs_host=runs_host)


def _address(task: Task, interface: str | None) -> str:
    return task.host_address or find_host_address(task.master_addr, interface=interface, environ=os.environ)


@contextmanager
def _job_store(task: Task, address: str, timeout: timedelta) -> Iterator[tuple[str, int]]:
    if task.agent_store:
        if task.index:
            yield _find_store(task, timeout)
            return
        with serve_store(address) as port:
            _announce_store(task, (address, port), timeout)
            yield address, port
        return
    # The others know the store by this address, whichever one this host has for other traffic.
    known = LOOPBACK if address == LOOPBACK else resolve(task.master_addr)[1]
    with nullcontext(task.master_port) if task.index else serve_store(known, task.master_port) as port:
        yield known, port


def _find_store(task: Task, timeout: timedelta) -> tuple[str, int]:
    """Where task 0 serves the store, asked through the launcher's own store.

    That one keeps what earlier attempts of the job left there. So each attempt asks under a name nobody used before,
    and is answered under that name.
    """
    agent = connect_store(task.master_addr, task.master_port, timeout=timeout)
    name = uuid.uuid4().hex
    agent.set(f"mrl/asks/{task.index}", name)
    address, _, port = agent.get(f"mrl/answer/{name}").decode().rpartition(" ")
    connect_store(address, int(port), timeout=timeout).set(f"joined/{task.index}", "")
    return address, int(port)


def _announce_store(task: Task, place: tuple[str, int], timeout: timedelta) -> None:
    """Answer the other tasks, as often as they ask, until all have joined the store at `place`."""
    agent = connect_store(task.master_addr, task.master_port, timeout=timeout)
    store = connect_store(*place, timeout=timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, task.count)), set()
    while missing := {index for index in missing if not store.check([f"joined/{index}"])}:
        for index in missing:
            if agent.check([f"mrl/asks/{index}"]) and (name := agent.get(f"mrl/asks/{index}")) not in answered:
                agent.set(f"mrl/answer/{name.decode()}", f"{place[0]} {place[1]}")
                answered.add(name)
        if time.monotonic() > deadline:
            raise ValueError(
                f"tasks {sorted(missing)} did not join the job's store at {join_host_port(*place)} within "
                f"{timeout.total_seconds():.0f} s; were they started, and does a firewall let them reach this host?"
            )
        time.sleep(_POLL_S)
