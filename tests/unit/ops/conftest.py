import shutil
from pathlib import Path

import pytest
import torch

from mrl.ops import extension, reference


@pytest.fixture(scope="session")
def compiled():
    """The C++ ops, compiled once and kept in build/; with their CUDA part where there is a device."""
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"compiling csrc/ needs {tool}")
    folder = Path(__file__).parents[3] / "build" / "ops"
    return extension.load(extension.build(with_cuda=torch.cuda.is_available(), folder=folder))


@pytest.fixture(params=["compiled", "reference"])
def ops(request):
    """Both implementations, one after the other."""
    return reference if request.param == "reference" else request.getfixturevalue("compiled")
