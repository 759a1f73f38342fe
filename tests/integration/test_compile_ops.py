"""csrc/ compiles for A100, H100 and B200 on a machine without one, and the compiler of torch accepts the ops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiling for a GPU needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["batched_strided_copy", "checksum"])
def test_kernels_compile_without_spills(kernel, architecture, tmp_path):
    target = tmp_path / "kernel.cubin"
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-I", "csrc/include"]
    command += [f"csrc/cuda/{kernel}.cu", "-o", str(target)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 0
    spills = [line for line in result.stderr.splitlines() if "spill" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's headers come with nvcc")
def test_the_loop_over_the_copy_engines_compiles(tmp_path):
    command = ["nvcc", "-std=c++20", "-O3", "-c", "-I", "csrc/include", "csrc/cuda/copy_engine.cpp"]
    command += ["-o", str(tmp_path / "copy_engine.o")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


OPCHECK = """
import sys; sys.path.insert(0, "tests/unit/ops")
import torch
from pathlib import Path
from plans import random_plan
from mrl.ops import extension
ops = extension.load(extension.build(with_cuda=False, folder=Path("build/ops")))
plan = random_plan(0)
tiles = ops.build_tiles(plan.descriptors, 1024)
token = torch.empty(0)
torch.library.opcheck(ops.batched_strided_copy_.default, (token, tiles))
torch.library.opcheck(ops.batched_strided_copy_checksum_.default, (token, tiles))
torch.library.opcheck(ops.checksum.default, (tiles, True))
torch.library.opcheck(ops.build_tiles.default, (plan.descriptors, 256))
copies = plan.descriptors[plan.descriptors[:, 0] != 0]
torch.library.opcheck(ops.copy_engine_copy_.default, (token, copies))
"""


def test_ops_pass_the_whole_of_opcheck():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", OPCHECK], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
