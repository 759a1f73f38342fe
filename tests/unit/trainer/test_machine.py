"""Whether this host has what a job's ranks run on."""

from __future__ import annotations

import pytest
import torch

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
