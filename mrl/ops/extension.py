"""Where the ops come from: the extension built at install, one built at first use, or the torch reference.

Built at first use on a host with a CUDA device and nvcc, into `$MRL_CACHE_DIR` (default ~/.cache/mrl), once for all
processes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from mrl.cuda_tools import nvcc_cuda, torch_cuda
from mrl.ops import fake, reference

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
COMPILE_FLAGS = ["-O3", "-std=c++20"]
OPENMP = ["-fopenmp"]
"""What at::parallel_for needs to use threads."""
BUILT_AT_INSTALL = _PACKAGE / "_ops.so"


@functools.cache
def backend() -> Any:
    """The namespace that holds the ops: `torch.ops.mrl`, or `mrl.ops.reference` with one warning."""
    if _is_loaded() or _installed_is_current():
        return load(BUILT_AT_INSTALL)
    missing = _missing_for_build()
    if not missing:
        return load(build(with_cuda=True))
    logger.warning(
        "copying weights with torch, many times slower than the compiled ops, which need %s. Install it, or install "
        "mrl where it is",
        missing,
    )
    return reference


def load(library: Path) -> Any:
    """Load a built extension, unless this process has one, and return `torch.ops.mrl`.

    Raises:
        OSError: the library was built for another torch or another machine; remove it.
    """
    # A second build, from another folder, would end the process: its ops have the names of the first.
    if not _is_loaded():
        torch.ops.load_library(library)
    fake.register()
    return torch.ops.mrl


def _is_loaded() -> bool:
    """Whether this process has a build; that which it compiles itself it has from then on."""
    return hasattr(torch.ops.mrl, "build_tiles")


def source_folder() -> Path:
    """csrc/, in an installed package or in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def source_files(folder: Path, *, with_cuda: bool) -> list[str]:
    """The files to compile under csrc/."""
    patterns = ["*.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if with_cuda else [])]
    return [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]


def build(*, with_cuda: bool, folder: Path | None = None) -> Path:
    """Compile csrc/ and return the library; one process compiles, others wait for it.

    Args:
        folder: parent of the build's own folder, which is named after the sources, torch and the GPU.

    Raises:
        RuntimeError: the compiler's output.
    """
    target = (folder or _cache_folder()) / _build_name(with_cuda)
    library = target / "mrl_ops.so"
    target.mkdir(parents=True, exist_ok=True)
    with (target / "in_progress").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            logger.info("compiling csrc/ into %s, about a minute", target)
            _compile(library, with_cuda)
    return library


def _compile(library: Path, with_cuda: bool) -> None:
    # Not at file top: it warns on every host without a device, and takes a second.
    from torch.utils import cpp_extension

    work = library.parent / "objects"
    work.mkdir(exist_ok=True)
    # torch's own lock file outlives a killed build and then blocks for ever; ours guards the folder already.
    (work / "lock").unlink(missing_ok=True)
    sources = source_folder()
    cpp_extension.load(
        library.stem,
        source_files(sources, with_cuda=with_cuda),
        extra_include_paths=[str(sources / "include")],
        extra_cflags=[*COMPILE_FLAGS, *OPENMP],
        extra_cuda_cflags=COMPILE_FLAGS,
        extra_ldflags=OPENMP,
        build_directory=str(work),
        with_cuda=with_cuda,
        is_python_module=False,
        is_standalone=False,
    )
    # A library of this name is always whole, however a build ends.
    (work / library.name).replace(library)


def _installed_is_current() -> bool:
    """Whether install built the extension, and from the present sources: those of a checkout may have changed."""
    if not BUILT_AT_INSTALL.exists():
        return False
    built = BUILT_AT_INSTALL.stat().st_mtime
    checkout = source_folder() != _PACKAGE / "csrc"
    return not checkout or all(path.stat().st_mtime <= built for path in source_folder().rglob("*.*"))


def _missing_for_build() -> str:
    """What a build at first use lacks here, or empty."""
    if not torch.cuda.is_available():
        return "a CUDA device"
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc (the CUDA toolkit; set CUDA_HOME)"
    found = nvcc_cuda(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
    if found != torch_cuda():
        return f"nvcc of CUDA {torch_cuda()}, as torch; {cpp_extension.CUDA_HOME} has CUDA {found} (set CUDA_HOME)"
    if not source_folder().is_dir():
        return f"the sources in {source_folder()}"
    return "" if cpp_extension.is_ninja_available() else "ninja (pip install ninja)"


def _build_name(with_cuda: bool) -> str:
    digest = hashlib.sha256(" ".join([torch.__version__, *COMPILE_FLAGS, *OPENMP]).encode())
    if with_cuda:
        digest.update(str(torch.cuda.get_device_capability() if torch.cuda.is_available() else "").encode())
        digest.update(os.environ.get("TORCH_CUDA_ARCH_LIST", "").encode())
    for path in sorted(source_folder().rglob("*.*")):
        digest.update(path.read_bytes())
    return f"ops_{'cuda' if with_cuda else 'cpu'}_{digest.hexdigest()[:16]}"


def _cache_folder() -> Path:
    return Path(os.environ.get("MRL_CACHE_DIR", "~/.cache/mrl")).expanduser()
