"""Tasks that srun started. SLURM names hosts and counts tasks; it has no port and no address for the job's store."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mrl.launch.addresses import JOB_PORTS
from mrl.launch.task import Task, read_numbers


def read_slurm_task(environ: Mapping[str, str]) -> Task:
    """This task of a job step. MASTER_ADDR and MASTER_PORT win over the first host and a port made from the job's id.

    Raises:
        ValueError: a variable srun should have set is missing.
    """
    names = {"index": "SLURM_PROCID", "count": "SLURM_NTASKS", "local_index": "SLURM_LOCALID"}
    numbers = read_numbers("slurm", names | {"node_rank": "SLURM_NODEID"}, environ)
    return Task(
        **numbers,
        master_addr=environ.get("MASTER_ADDR") or _first_host(environ),
        master_port=int(environ.get("MASTER_PORT") or _port_of_step(environ)),
        host_address=environ.get("MRL_HOST_ADDRESS"),
    )


def _first_host(environ: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    for name in names:
        if environ.get(name):
            return first_of_hostlist(environ[name])
    raise ValueError(f"srun set none of {', '.join(names)}; export MASTER_ADDR, the first host's name or address")


def first_of_hostlist(hosts: str) -> str:
    """The first name of SLURM's short form: gpu[007-009,12],login is gpu007, gpu008, ..."""
    # Of every bracket only the first number counts; names are separated by commas outside brackets.
    first = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", hosts)
    return first.split(",")[0]


def _port_of_step(environ: Mapping[str, str]) -> int:
    names = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID"}
    numbers = read_numbers("slurm", names, environ)
    # Steps of one job may run side by side, and so may arrays, whose jobs have neighbouring ids.
    return JOB_PORTS[(numbers["job"] * 13 + numbers["step"]) % len(JOB_PORTS)]
