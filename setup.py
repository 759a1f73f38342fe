"""Package build; the optional compiled extension of csrc/ is added where a compiler for it exists."""

import logging
import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup

logger = logging.getLogger("mrl.setup")
ROOT = Path(__file__).parent
FLAGS = ["-O3", "-std=c++20"]
DEVICE = Path("/dev/nvidiactl")


def extension_options() -> dict:
    """Arguments of `setup` that compile csrc/ into mrl/_ops.so, or none.

    MRL_BUILD_OPS=1 compiles wherever nvcc is, 0 nowhere; unset, only on hosts with an NVIDIA device. Without it, a GPU
    host compiles at first use.
    """
    wanted = os.environ.get("MRL_BUILD_OPS", "1" if DEVICE.exists() else "0")
    if wanted == "0":
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError:
        logger.warning("mrl: torch is not importable here, so csrc/ is not compiled; use pip's --no-build-isolation")
        return {}
    if cpp_extension.CUDA_HOME is None or shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin") is None:
        logger.warning("mrl: no nvcc found, so csrc/ is not compiled; set CUDA_HOME")
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):
        """Compiles if it can; a failure is told and does not end the install."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                logger.warning("mrl: compiling csrc/ failed, mrl is installed without it: %s", error)
                self.extensions.clear()

    if not DEVICE.exists():
        # With a device torch compiles for that; for an image that is built elsewhere, Hopper, and what comes after it.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    patterns = ("*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu")
    sources = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))
    extension = cpp_extension.CUDAExtension(
        "mrl._ops",
        sources,
        include_dirs=[str(ROOT / "csrc" / "include")],
        extra_compile_args={"cxx": [*FLAGS, "-fopenmp"], "nvcc": FLAGS},
        extra_link_args=["-fopenmp"],
    )
    command = OptionalBuild.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(
    packages=[*find_packages(include=["mrl", "mrl.*"]), "mrl.configs", "mrl.csrc"],
    # Sources travel with the package: a GPU host compiles them at first use.
    package_dir={"mrl.configs": "configs", "mrl.csrc": "csrc"},
    package_data={
        "mrl": ["py.typed"],
        "mrl.configs": ["*.yaml", "*/*.yaml"],
        "mrl.scale": ["models/*.json"],
        "mrl.csrc": ["*.cpp", "include/mrl/*.h", "cpu/*.cpp", "cuda/*"],
    },
    **extension_options(),
)
