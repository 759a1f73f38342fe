"""A task: one process that a launcher started, for one rank of the job or for one host with all of its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, frozen=True)
class Task:
    """What a launcher says of a process that it started."""

    index: int
    """Of all tasks; task 0 is on host 0."""
    count: int
    local_index: int
    node_rank: int
    master_addr: str
    """Name or address of host 0."""
    master_port: int = 0
    """Where host 0 is to serve the job's store; 0 is any port, for others learn it in another way."""
    host_address: str | None = None
    """Of this host, where the launcher or the user named it."""
    agent_store: bool = False
    """Whether a store of the launcher's own listens at `master_addr` and `master_port`."""
    owns_host: bool = False
    """Whether the launcher starts hosts only, never single ranks."""

    def runs_host(self, *, num_nodes: int, ranks_per_node: int) -> bool:
        """Whether this task starts all ranks of its host; False where it is itself a rank.

        Raises:
            ValueError: the tasks are neither the ranks nor the hosts of the job, or are not numbered host by host.
        """
        if self.count == num_nodes and (self.owns_host or ranks_per_node > 1):
            placed = self.index == self.node_rank
        elif self.count == num_nodes * ranks_per_node:
            placed = self.index == self.node_rank * ranks_per_node + self.local_index
        else:
            raise ValueError(
                f"the launcher started {self.count} tasks; trainer.nnodes = {num_nodes} x trainer.n_gpus_per_node = "
                f"{ranks_per_node} needs {num_nodes * ranks_per_node} (one per rank) or {num_nodes} (one per host)"
            )
        if not placed:
            raise ValueError(
                f"task {self.index} is number {self.local_index} of host {self.node_rank}; start equally many on each "
                "host, and number them host by host (srun --distribution=block)"
            )
        return self.count == num_nodes and (self.owns_host or ranks_per_node > 1)


def read_numbers(
    launcher: str, names: Mapping[str, str], environ: Mapping[str, str], *, also: Iterable[str] = ()
) -> dict[str, Any]:
    """The variables `names` of the environment as numbers; those of `also` must be there, too.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in (*names.values(), *also) if name not in environ]
    if missing:
        raise ValueError(f"launcher {launcher} did not set {', '.join(missing)}; export them for every task")
    return {field: int(environ[name]) for field, name in names.items()}
