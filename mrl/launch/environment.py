"""A process's place in the job, read from whatever started it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from mrl.launch.addresses import LOOPBACK, socket_variables
from mrl.launch.slurm import read_slurm_task
from mrl.launch.task import Task, read_numbers

LAUNCHERS = ("auto", "local", "torchrun", "slurm", "ray")


@dataclass(kw_only=True, frozen=True)
class RankEnvironment:
    """What torch.distributed needs to know of this process. Ranks are numbered host by host."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    """Where the job's store listens."""
    master_port: int
    node_rank: int = 0
    host_address: str = LOOPBACK
    """Under which the other hosts reach this rank's host."""
    attempt: int = 0
    """How often the job's tasks have started their ranks again; ranks of one attempt meet each other only."""

    def export(self) -> None:
        """Set what torch, gloo, NCCL and the engines read in this process; a user's choice of interface stays."""
        for name, value in socket_variables(self.host_address).items():
            os.environ.setdefault(name, value)
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def host_environments(
    *,
    num_nodes: int,
    ranks_per_node: int,
    master_addr: str,
    master_port: int,
    node_rank: int = 0,
    host_address: str = LOOPBACK,
) -> list[RankEnvironment]:
    """The ranks of one host of a job."""
    return [
        RankEnvironment(
            rank=node_rank * ranks_per_node + local_rank,
            local_rank=local_rank,
            world_size=num_nodes * ranks_per_node,
            local_world_size=ranks_per_node,
            master_addr=master_addr,
            master_port=master_port,
            node_rank=node_rank,
            host_address=host_address,
        )
        for local_rank in range(ranks_per_node)
    ]


def detect_launcher(requested: str, environ: Mapping[str, str]) -> str:
    """The launcher that started this process: `requested` unless it is "auto".

    "auto" is torchrun's agent, else srun, else a Ray cluster that this process is part of or is pointed to, else local.

    Returns:
        One of LAUNCHERS, or "host" where a driver started this process for one host and said so in MRL_NODE_RANK.

    Raises:
        ValueError: an unknown launcher, or one whose environment variables are absent.
    """
    if requested not in LAUNCHERS:
        raise ValueError(f"trainer.launcher = {requested!r} is not one of {', '.join(LAUNCHERS)}")
    if "MRL_NODE_RANK" in environ:
        return "host"
    if requested != "auto":
        if requested == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
            raise ValueError("trainer.launcher = torchrun, but TORCHELASTIC_RUN_ID is not set; start with torchrun")
        if requested == "slurm" and "SLURM_PROCID" not in environ:
            raise ValueError("trainer.launcher = slurm, but SLURM_PROCID is not set; start with srun")
        return requested
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    # A batch script has SLURM_PROCID = 0 too, but only what srun started is in a step.
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    return "ray" if _is_on_ray(environ) else "local"


def _is_on_ray(environ: Mapping[str, str]) -> bool:
    """Whether `ray job submit`, a Ray worker or the user pointed this process to a cluster, or it has joined one."""
    ray = sys.modules.get("ray")
    if "RAY_JOB_ID" in environ or (ray is not None and ray.is_initialized()):
        return True
    # An http address is the dashboard's, by which jobs are submitted from outside.
    return bool(environ.get("RAY_ADDRESS")) and not environ["RAY_ADDRESS"].startswith("http")


def read_task(launcher: str, environ: Mapping[str, str]) -> Task:
    """This process's place among those that `launcher` started.

    Raises:
        ValueError: a variable the launcher should have set is missing.
    """
    match launcher:
        case "torchrun":
            return _read_torchrun_task(environ)
        case "slurm":
            return read_slurm_task(environ)
        case "host":
            return _read_host_task(environ)
        case _:
            return Task(index=0, count=1, local_index=0, node_rank=0, master_addr=LOOPBACK, owns_host=True)


def _read_torchrun_task(environ: Mapping[str, str]) -> Task:
    names = {"index": "RANK", "count": "WORLD_SIZE", "local_index": "LOCAL_RANK", "node_rank": "GROUP_RANK"}
    numbers = read_numbers("torchrun", names | {"master_port": "MASTER_PORT"}, environ, also=["MASTER_ADDR"])
    return Task(
        **numbers,
        master_addr=environ["MASTER_ADDR"],
        host_address=environ.get("MRL_HOST_ADDRESS"),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _read_host_task(environ: Mapping[str, str]) -> Task:
    names = {"index": "MRL_NODE_RANK", "count": "MRL_NNODES", "master_port": "MASTER_PORT"}
    numbers = read_numbers("host", names, environ, also=["MASTER_ADDR", "MRL_HOST_ADDRESS"])
    return Task(
        **numbers,
        local_index=0,
        node_rank=numbers["index"],
        master_addr=environ["MASTER_ADDR"],
        host_address=environ["MRL_HOST_ADDRESS"],
        owns_host=True,
    )
