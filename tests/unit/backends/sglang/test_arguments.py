"""On which GPUs an engine's processes are told to run."""

from __future__ import annotations

import pytest

from mrl.backends.sglang.arguments import child_environment, engine_args


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def base_gpu(model_folder, gpus):
    args = engine_args(model_folder, tp_size=2, dtype="bfloat16", device="cuda", context_length=8, gpus=gpus)
    return args.get("base_gpu_id")


@pytest.mark.parametrize(("gpus", "base"), [((), None), ((0, 1), 0), ((2, 3), 2), ((3, 2), 0), ((0, 2), 0)])
def test_an_engine_begins_at_its_first_gpu_where_they_follow_each_other(model_folder, gpus, base):
    assert base_gpu(model_folder, gpus) == base


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
