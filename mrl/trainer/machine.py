"""What a job's ranks run on: the device and how much memory there is. Creates no CUDA context."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from mrl.cuda_tools import driver_cuda, torch_cuda

Device = Literal["cpu", "cuda"]


@dataclass(kw_only=True, frozen=True)
class Machine:
    """One host of the job; all are taken to be alike."""

    device: Device
    host_bytes: int
    """Main memory."""
    gpu_bytes: int = 0
    """Memory of each GPU; 0 on CPU."""

    def rank_bytes(self, ranks_per_host: int) -> int:
        """What one rank may use: its GPU's memory, or its share of the host's."""
        return self.gpu_bytes if self.device == "cuda" else self.host_bytes // ranks_per_host


def find_machine(requested: str) -> Machine:
    """This host, with the requested device; see `choose_device`."""
    device = choose_device(requested)
    host_bytes = host_memory()
    if device == "cpu":
        return Machine(device=device, host_bytes=host_bytes)
    import pynvml

    pynvml.nvmlInit()
    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    return Machine(device=device, host_bytes=host_bytes, gpu_bytes=int(memory.total))


def host_memory() -> int:
    """Main memory of this host that its jobs may use, in bytes."""
    return min([psutil.virtual_memory().total, *memory_limits()])


def memory_limits(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Of this process's control groups and all around them, in bytes: what SLURM's --mem or a container grants."""
    limits = []
    for line in process.read_text().splitlines() if process.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(top)]
        texts = [file.read_text().strip() for file in files if file.is_file()]
        limits += [int(text) for text in texts if text != "max"]
    return limits


def choose_device(requested: str) -> Device:
    """ "cuda" or "cpu"; "auto" takes CUDA where there is any.

    Raises:
        ValueError: CUDA is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ValueError("trainer.device = cuda, but torch finds no CUDA device; set trainer.device=cpu or auto")
    return "cuda" if available and requested != "cpu" else "cpu"


def check_gpus(ranks_per_host: int) -> None:
    """ValueError unless this process sees a GPU for each rank of its host, which torch and this package can use."""
    runs, wanted = driver_cuda(), torch_cuda()
    if runs is not None and runs < wanted:
        raise ValueError(
            f"this host's driver runs CUDA {runs}, but torch was built for CUDA {wanted}; install a newer one (580 and "
            "later run CUDA 13)"
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise ValueError(
                f"{name}={os.environ[name]}: engines read the trainer's memory, and segments that expand cannot be "
                "shared; unset it, or set expandable_segments:False"
            )
    seen, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen < ranks_per_host:
        limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ValueError(
            f"trainer.n_gpus_per_node = {ranks_per_host}, but {seen} of this host's GPUs can be seen here{limited}; "
            "lower it, or let every task see all GPUs of its host (srun: neither --gpus-per-task nor --gpu-bind)"
        )
