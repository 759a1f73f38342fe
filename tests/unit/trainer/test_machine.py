"""Whether this host has what a job's ranks run on."""

from __future__ import annotations

import psutil
import pytest
import torch

from mrl.trainer import machine
from mrl.trainer.machine import check_gpus, memory_limits


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"memory.max": "1000\n"}, [1000]),
        ("0::/", {"memory.max": "max\n"}, []),
        ("0::/", {}, []),
        ("0::/slurm/job_1/step", {"slurm/job_1/memory.max": "500", "slurm/memory.max": "max"}, [500]),
        ("0::/a/b", {"a/b/memory.max": "700", "a/memory.max": "600"}, [700, 600]),
        (
            "12:cpu,cpuacct:/x\n9:memory:/slurm/job_1",
            {"memory/slurm/job_1/memory.limit_in_bytes": "300", "memory/memory.limit_in_bytes": "9223372036854771712"},
            [300, 9223372036854771712],
        ),
    ],
)
def test_what_control_groups_grant_is_known(tmp_path, groups, files, limits):
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    process.write_text(groups + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert memory_limits(root, process) == limits
    assert memory_limits(root, tmp_path / "gone") == []


@pytest.mark.parametrize(("limits", "granted"), [([], None), ([1000, 3000], 1000)])
def test_a_host_has_what_its_control_groups_grant_if_anything_limits_it(monkeypatch, limits, granted):
    monkeypatch.setattr(machine, "memory_limits", lambda: limits)
    assert machine.find_machine("cpu").host_bytes == (granted or psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("visible", "told"), [(None, "here; lower it"), ("5", r"here \(CUDA_VISIBLE_DEVICES=5\); lower it")]
)
def test_a_host_with_fewer_gpus_than_ranks_is_refused_with_both_numbers(monkeypatch, visible, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_gpus(1)
    with pytest.raises(ValueError, match=rf"n_gpus_per_node = 4, but 1 of this host's GPUs can be seen {told}"):
        check_gpus(4)


def test_what_torch_or_the_engines_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(machine, "torch_cuda", lambda: 13)
    monkeypatch.setattr(machine, "driver_cuda", lambda: 12)
    with pytest.raises(ValueError, match="driver runs CUDA 12, but torch was built for CUDA 13"):
        check_gpus(4)
    monkeypatch.setattr(machine, "driver_cuda", lambda: 13)
    check_gpus(4)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
            with pytest.raises(ValueError, match=f"{name}=.*segments that expand cannot be shared"):
                check_gpus(4)
