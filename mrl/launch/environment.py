"""A rank's place in the job, read from whatever started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHERS = ("auto", "local", "torchrun", "slurm", "ray")


@dataclass(kw_only=True, frozen=True)
class RankEnvironment:
    """What torch.distributed needs to know of this process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    listen_fd: int | None = None
    """Socket that already listens on master_port, in ranks that share it with their parent."""

    def export(self) -> None:
        """Set the environment variables of torch's env:// rendezvous in this process."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def detect_launcher(requested: str, environ: Mapping[str, str]) -> str:
    """The launcher that started this process: `requested` unless it is "auto".

    Raises:
        ValueError: an unknown launcher, or one whose environment variables are absent.
    """
    if requested not in LAUNCHERS:
        raise ValueError(f"trainer.launcher = {requested!r} is not one of {', '.join(LAUNCHERS)}")
    if requested == "ray":
        raise ValueError("trainer.launcher = ray is not available in this version; use local or torchrun")
    if requested != "auto":
        if requested == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
            raise ValueError("trainer.launcher = torchrun, but TORCHELASTIC_RUN_ID is not set; start with torchrun")
        if requested == "slurm" and "SLURM_PROCID" not in environ:
            raise ValueError("trainer.launcher = slurm, but SLURM_PROCID is not set; start with srun")
        return requested
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    return "local"


def read_environment(launcher: str, environ: Mapping[str, str]) -> RankEnvironment:
    """This rank's environment under torchrun or srun.

    Raises:
        ValueError: a variable the launcher should have set is missing.
    """
    names = _TORCHRUN_NAMES if launcher == "torchrun" else _SLURM_NAMES
    missing = [name for name in (*names.values(), "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise ValueError(f"launcher {launcher} did not set {', '.join(missing)}; export them for every task")
    numbers = {field: int(environ[name].split("(")[0]) for field, name in names.items()}
    return RankEnvironment(**numbers, master_addr=environ["MASTER_ADDR"], master_port=int(environ["MASTER_PORT"]))


_TORCHRUN_NAMES = {
    "rank": "RANK",
    "local_rank": "LOCAL_RANK",
    "world_size": "WORLD_SIZE",
    "local_world_size": "LOCAL_WORLD_SIZE",
}
_SLURM_NAMES = {
    "rank": "SLURM_PROCID",
    "local_rank": "SLURM_LOCALID",
    "world_size": "SLURM_NTASKS",
    "local_world_size": "SLURM_NTASKS_PER_NODE",
}
