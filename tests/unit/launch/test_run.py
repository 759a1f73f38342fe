"""What is refused before any rank starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mrl.config.load import load_config
from mrl.data.embedded import materialise
from mrl.launch import run
from mrl.launch.run import launch


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_restarts_are_refused_where_each_rank_is_a_task_of_its_own(launcher, tmp_path, monkeypatch, caplog):
    variables = {
        "torchrun": {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
        "slurm": {
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "1",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": "localhost",
        },
    }[launcher]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    keys = ("trainer.n_gpus_per_node=2", "trainer.max_restarts=1", "trainer.save_freq=1")
    config = load_config([*keys, f"trainer.default_local_dir={tmp_path}", f"trainer.launcher={launcher}"])
    assert launch(config) == 1
    assert "trainer.max_restarts = 1 cannot act with one task per rank" in caplog.text
    assert "torchrun --max-restarts=1" in caplog.text


_PREPARE = """
import sys
import torch
folder = sys.argv[1]

def touch(*args):
    raise SystemExit("CUDA was touched in the launching process")

torch.cuda._raw_device_count_nvml = lambda: 1
for name in ("_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_init"):
    setattr(torch._C, name, touch)

from mrl.config.load import load_config
from mrl.launch import run
from mrl.trainer.inputs import load_inputs
from mrl.trainer.machine import Machine
from mrl.trainer.plan import plan_run
config = load_config([f"trainer.default_local_dir={folder}", "trainer.n_gpus_per_node=1", *sys.argv[2:]], "demo")
run.prepare_process()
plan = plan_run(config, machine=Machine(device="cuda", host_bytes=2**40, gpu_bytes=2**37))
load_inputs(config, plan)
assert not {"torchao", "transformers.modeling_utils", "megatron", "sglang"} & sys.modules.keys()
"""


def test_what_a_launching_process_does_before_it_forks_gpu_ranks_starts_no_cuda(tmp_path):
    one = [
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
        "critic.megatron.pipeline_model_parallel_size=1",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    ]
    # By a process of its own, as a launching process has it done: that one imports what starts CUDA.
    materialise(tmp_path / "embedded")
    command = [sys.executable, "-c", _PREPARE, str(tmp_path), *one]
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3], env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_rank_that_inherited_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA was started in the process that launched the ranks before it forked"):
        run._refuse_inherited_cuda()
