"""`mrl doctor`: what this machine offers a run, and what it lacks. Imports neither Megatron nor SGLang."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.markup import escape

from mrl.cuda_tools import driver_cuda, find_nvcc, nvcc_cuda, torch_cuda
from mrl.observability.console import show_table

_FEW_FILES = 4096
_LITTLE_SHARED_MEMORY = 1 << 30
_LOCAL_LAYERS = "Megatron's local layers are used: no fused norm and linear, no flash attention, no fused Adam"
_BUILD_TE = "`make gpu`, or `sh tools/make_te.sh ENVIRONMENT`, builds it"
_EXTRAS = {
    "ray": "trainer.launcher=ray cannot be used; pip install 'mrl[ray]'",
    "gpu": f"{_LOCAL_LAYERS}; {_BUILD_TE}",
}
"""What is lost without an optional group of requirements, and what to do about it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    found: str
    remedy: str = ""
    """What to do about it; empty where all is well."""
    is_error: bool = False
    """A run fails, or computes something else than it should."""


def examine() -> list[Finding]:
    """Everything worth knowing before a run."""
    gpus = _find_gpus()
    return [
        Finding("Python", platform.python_version()),
        *check_requirements(requires("mrl") or (), has_gpu=bool(gpus)),
        check_apex(),
        *(gpus or [Finding("GPU", "none: runs use the CPU")]),
        *(_check_gpu_tools() if gpus else []),
        Finding("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {os.cpu_count()} cores"),
        *check_limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0], shutil.disk_usage("/dev/shm").total),
    ]


def check_requirements(requirements: Iterable[str], *, has_gpu: bool) -> list[Finding]:
    """Each pinned requirement against what is installed; optional ones may be absent."""
    findings = []
    for requirement in map(Requirement, requirements):
        extra = next((name for name in _EXTRAS if requirement.marker and name in str(requirement.marker)), None)
        if not any(each.operator == "==" for each in requirement.specifier) or (requirement.marker and not extra):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wanted = extra != "gpu" or has_gpu
            remedy = _EXTRAS[extra] if extra else f"pip install {requirement}"
            findings.append(Finding(requirement.name, "absent", remedy if wanted else "", is_error=extra is None))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        findings.append(Finding(requirement.name, found, "" if fits else f"needs {requirement.specifier}", not fits))
    return findings


def check_apex() -> Finding:
    """NVIDIA's apex, which Megatron uses where it is, or the unrelated web toolkit that PyPI has under this name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "absent: not needed")
    folder = Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or ["."])))
    if (folder / "optimizers").is_dir():
        return Finding("apex", f"NVIDIA's, {folder}")
    return Finding("apex", f"not NVIDIA's, {folder}", "pip uninstall apex: PyPI's is an unrelated web toolkit", True)


def refuse_wrong_apex() -> None:
    """Raise ValueError where Megatron would import the apex that is not NVIDIA's."""
    finding = check_apex()
    if finding.is_error:
        raise ValueError(f"the installed apex is {finding.found}, and Megatron would import it; {finding.remedy}")


def check_limits(open_files: int, shared_memory: int) -> list[Finding]:
    """Limits of this process that large jobs run into.

    Args:
        open_files: soft limit; `resource.RLIM_INFINITY` is none.
        shared_memory: bytes of /dev/shm.
    """
    few = open_files != resource.RLIM_INFINITY and open_files < _FEW_FILES
    small = shared_memory < _LITTLE_SHARED_MEMORY
    return [
        Finding("open files", str(open_files), f"ulimit -n {_FEW_FILES} or more" if few else ""),
        Finding(
            "/dev/shm",
            f"{shared_memory / 2**30:.1f} GiB",
            "NCCL and engines keep buffers there; give the container --shm-size=16g" if small else "",
        ),
    ]


def _find_gpus() -> list[Finding]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    driver = pynvml.nvmlSystemGetDriverVersion()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [
        Finding(
            f"GPU {index}",
            f"{pynvml.nvmlDeviceGetName(handle)}, {pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30:.0f} GiB, "
            f"driver {driver}",
        )
        for index, handle in enumerate(handles)
    ]


def _check_gpu_tools() -> list[Finding]:
    wanted, nvcc = torch_cuda(), find_nvcc(os.environ)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return [
        check_driver(driver_cuda(), wanted),
        check_nvcc(nvcc, nvcc_cuda(nvcc) if nvcc else None, wanted),
        check_tool("g++", shutil.which(os.environ.get("CXX", "g++"))),
        check_tool("Python.h", str(headers) if headers.is_file() else None),
        *check_transformer_engine(),
    ]


def check_driver(runs: int | None, wanted: int) -> Finding:
    """The driver against torch's CUDA; a driver that does not say what it runs passes."""
    fits = runs is None or runs >= wanted
    remedy = f"torch was built for CUDA {wanted}; install a driver that runs it (580 or newer for CUDA 13)"
    return Finding(
        "driver", "of unknown CUDA" if runs is None else f"runs CUDA {runs}", "" if fits else remedy, not fits
    )


def check_nvcc(nvcc: Path | None, found: int | None, wanted: int) -> Finding:
    """SGLang compiles kernels at its first start, and mrl the reshard's."""
    fits = nvcc is not None and found == wanted
    remedy = f"engines cannot start without nvcc of CUDA {wanted}, torch's; install the toolkit and set CUDA_HOME"
    return Finding("nvcc", f"{nvcc}, CUDA {found or '?'}" if nvcc else "absent", "" if fits else remedy, not fits)


def check_tool(name: str, path: str | None) -> Finding:
    """What nvcc and Triton compile their host code with."""
    remedy = "kernels cannot be compiled without it; Debian: apt install g++ python3.12-dev"
    return Finding(name, path or "absent", "" if path else remedy, path is None)


def check_transformer_engine() -> list[Finding]:
    """Whether what is installed of it can be imported; nothing to say where it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return []
    # In a process of its own: it starts CUDA.
    command = [sys.executable, "-c", "import transformer_engine.pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Finding("transformer_engine.pytorch", "can be imported")]
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return [
        Finding(
            "transformer_engine.pytorch", f"cannot be imported: {reason:.200}", f"{_LOCAL_LAYERS}; {_BUILD_TE}", True
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the report; the exit status is 1 where a run would fail."""
    argparse.ArgumentParser(prog="mrl doctor", description=__doc__).parse_args(arguments)
    findings = examine()
    rows = [(each.name, each.found + (f"\n-> {each.remedy}" if each.remedy else "")) for each in findings]
    show_table("This machine", [(name, escape(text)) for name, text in rows])
    return int(any(each.is_error for each in findings))
