"""A Ray cluster of several nodes on this machine, in processes of its own: Ray's threads must not be forked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_PROGRAM = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
for _ in range(int(sys.argv[1]) - 1):
    cluster.add_node(num_cpus=1)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class RayCluster:
    """A running cluster."""

    def __init__(self, address: str, pid: int) -> None:
        self.address = address
        self._process = psutil.Process(pid)

    def tasks(self) -> list[psutil.Process]:
        """The host tasks that run on its nodes, and their ranks."""
        found = []
        for process in self._process.children(recursive=True):
            # Processes end while one looks.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray_task" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@contextmanager
def ray_cluster(num_nodes: int) -> Iterator[RayCluster]:
    """A cluster of nodes with one CPU each, which only this machine reaches; nothing of it is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(num_nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ON_LOOPBACK},
        text=True,
    )
    family = {psutil.Process(process.pid)}
    try:
        assert process.stdout is not None
        # Ray itself prints, too.
        address = next(line.split()[1] for line in process.stdout if line.startswith("address "))
        family |= set(psutil.Process(process.pid).children(recursive=True))
        yield RayCluster(address, process.pid)
        family |= set(psutil.Process(process.pid).children(recursive=True))
        process.communicate(timeout=60)
    finally:
        for relative in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()
        process.wait()
