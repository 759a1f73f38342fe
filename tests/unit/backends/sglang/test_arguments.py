"""What engines are started with: GPUs, CUDA graphs, environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mrl.backends.sglang.arguments import EngineSettings, child_environment


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def engine_args(model_folder, **values):
    settings = {"tp_size": 2, "dtype": "bfloat16", "device": "cuda", "context_length": 8, **values}
    return EngineSettings(model_path=model_folder, **settings).engine_args()


@pytest.mark.parametrize(("gpus", "base"), [((), None), ((0, 1), 0), ((2, 3), 2), ((3, 2), 0), ((0, 2), 0)])
def test_an_engine_begins_at_its_first_gpu_where_they_follow_each_other(model_folder, gpus, base):
    assert engine_args(model_folder, gpus=gpus).get("base_gpu_id") == base


def test_every_batch_that_an_engine_can_run_has_a_cuda_graph(model_folder):
    assert engine_args(model_folder, max_running_requests=512)["cuda_graph_max_bs_decode"] == 512


def test_no_graph_is_asked_for_on_a_cpu(model_folder):
    args = engine_args(model_folder, device="cpu", dtype="float32", max_total_tokens=64)
    assert "cuda_graph_max_bs_decode" not in args


def test_what_the_user_gives_sglang_wins(model_folder):
    kwargs = {"cuda_graph_max_bs_decode": 8, "random_seed": 3}
    args = engine_args(model_folder, max_running_requests=512, engine_kwargs=kwargs)
    assert args | kwargs == args


@pytest.mark.parametrize("head", [{"head_dim": 16}, {}])
def test_heads_without_a_kernel_are_refused_on_a_gpu(model_folder, head):
    write_qwen3_moe(model_folder, **head)
    with pytest.raises(ValueError, match=r"head_dim = 16 of .*knows \(64, 128, 256, 512\)"):
        engine_args(model_folder)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (16, "float32")])
def test_heads_with_a_kernel_are_not(model_folder, head_dim, dtype):
    write_qwen3_moe(model_folder, head_dim=head_dim)
    assert engine_args(model_folder, dtype=dtype)["dtype"] == dtype


def write_qwen3_moe(folder, **values):
    config = {"model_type": "qwen3_moe", "hidden_size": 128, "num_attention_heads": 8, **values}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("gpus", "visible", "seen"),
    [
        ((2, 3), None, None),
        ((2, 0, 3, 1), None, "2,0,3,1"),
        ((1, 0), "4,6", "6,4"),
        ((1, 0), "GPU-a,GPU-b", "GPU-b,GPU-a"),
        ((), "4,6", None),
    ],
)
def test_processes_see_gpus_of_another_order_in_that_order(monkeypatch, gpus, visible, seen):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert child_environment("cuda", max(1, len(gpus)), gpus=gpus).get("CUDA_VISIBLE_DEVICES") == seen


def test_the_memory_saver_can_be_preloaded_wherever_the_cuda_runtime_is_installed(tmp_path, monkeypatch):
    """As SGLang starts its schedulers; a library that the loader cannot find would end them before Python starts."""
    if shutil.which("gcc") is None:
        pytest.skip("a stand-in for the driver needs gcc")
    hook = next(Path(torch.__file__).parents[1].glob("torch_memory_saver_hook_mode_preload_cu13*.so"))
    stub = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stub, "-x", "c", "/dev/null"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    environment = child_environment("cuda", 1)
    first, runtime = environment["LD_LIBRARY_PATH"].split(":")
    assert first == str(tmp_path), "the user's folders come first"
    assert list(Path(runtime).glob("libcudart.so.*"))
    done = subprocess.run(
        [sys.executable, "-c", "print('alive')"],
        env={**os.environ, **environment, "LD_PRELOAD": str(hook)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "alive\n", done.stderr


def test_no_cuda_library_is_searched_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    environment = child_environment("cpu", 1)
    assert "LD_LIBRARY_PATH" not in environment
    assert "SGLANG_NUMA_BIND_V2" not in environment
