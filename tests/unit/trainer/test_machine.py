"""Whether this host has what a job's ranks run on."""

from __future__ import annotations

import pytest
import torch

from mrl.trainer import machine
from mrl.trainer.machine import check_gpus


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
