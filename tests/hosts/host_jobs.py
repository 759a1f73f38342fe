"""Runs a function on the ranks of a job over several hosts, as the launcher does with one task per host."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from namespaces import HostProcess, Hosts

from mrl.launch.environment import RankEnvironment, read_task
from mrl.launch.fork import run_host_ranks
from mrl.launch.hosts import join_job

PORT = "4000"
TIMEOUT = timedelta(seconds=120)


def host_environment(hosts: Hosts, host: int) -> dict[str, str]:
    """What a driver sets for its task on a host."""
    return {
        "MRL_NODE_RANK": str(host),
        "MRL_NNODES": str(len(hosts.names)),
        "MRL_HOST_ADDRESS": hosts.addresses[host],
        "MASTER_ADDR": hosts.addresses[0],
        "MASTER_PORT": PORT,
    }


def start_ranks(
    hosts: Hosts, ranks_per_host: int, main: Callable[[RankEnvironment], Any], folder: Path
) -> list[HostProcess]:
    """Start `main` on every rank of every host; results go to `folder`."""

    def host_main() -> int:
        torch.set_num_threads(1)
        task = read_task("host", os.environ)
        count = len(hosts.names)
        with join_job(task, num_nodes=count, ranks_per_node=ranks_per_host, interface=None, timeout=TIMEOUT) as job:
            results = run_host_ranks(lambda env: pickle.dumps(main(env)), job.ranks, timeout_s=60)
            job.leave()
        (folder / f"results{task.index}").write_bytes(pickle.dumps([pickle.loads(result) for result in results]))
        return 0

    return [
        hosts.start(host, host_main, folder / f"log{host}", **host_environment(hosts, host))
        for host in range(len(hosts.names))
    ]


def run_on_hosts(hosts: Hosts, ranks_per_host: int, main: Callable[[RankEnvironment], Any], folder: Path) -> list[Any]:
    """What `main` returns on each rank, in rank order."""
    processes = start_ranks(hosts, ranks_per_host, main, folder)
    statuses = [process.wait(100) for process in processes]
    assert not any(statuses), "\n".join(process.output() for process in processes)
    folders = [folder / f"results{host}" for host in range(len(processes))]
    return [result for path in folders for result in pickle.loads(path.read_bytes())]
