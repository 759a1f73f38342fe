"""The driver and the compiler of a GPU host, against the CUDA that torch was built with. Starts no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch


def torch_cuda() -> int:
    """Major version of CUDA that torch was built with; 0 without CUDA."""
    return int((torch.version.cuda or "0").split(".")[0])


def driver_cuda() -> int | None:
    """Newest major version of CUDA that the driver runs; None where it does not say."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except pynvml.NVMLError:
        return None


def find_nvcc(environment: Mapping[str, str]) -> Path | None:
    """Where torch and SGLang look for nvcc: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home is None:
        on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
        home = str(Path(on_path).parents[1]) if on_path else "/usr/local/cuda"
    nvcc = Path(home, "bin", "nvcc")
    return nvcc if nvcc.is_file() else None


def nvcc_cuda(nvcc: Path) -> int | None:
    """Major version of CUDA that a compiler belongs to; None where it does not say."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", told)
    return int(release[1]) if release else None
