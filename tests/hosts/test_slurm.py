"""The training command under a real SLURM: a batch job with one task per host, and a step with one task per rank."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from namespaces import Unavailable
from slurm import SlurmCluster, python_module
from test_job import ROLLOUT, check_steps, job

pytestmark = pytest.mark.e2e


def make_cluster(hosts, folder: Path) -> SlurmCluster:
    folder.mkdir()
    try:
        return SlurmCluster(hosts, folder)
    except Unavailable as reason:
        pytest.skip(f"no SLURM on this machine: {reason}")


def test_a_batch_job_with_one_task_per_host_trains(make_hosts, tmp_path):
    hosts = make_hosts(2)
    cluster = make_cluster(hosts, tmp_path / "slurm")
    arguments = job(2, 2, tmp_path / "run", f"{ROLLOUT}.tensor_model_parallel_size=4")
    command = python_module("mrl.trainer.main_ppo", "trainer.launcher=slurm", *arguments)
    # As examples/slurm/two_hosts_16gpu.sbatch has it, but for the GPUs.
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/sh\nset -eu\nexec srun --kill-on-bad-exit=1 {shlex.join(command)}\n")
    shape = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path / 'job.out'}", "--exclusive"]
    submitted = cluster.run(["sbatch", "--wait", *shape, str(script)], tmp_path / "sbatch.out")
    status = submitted.wait(280)
    output = (tmp_path / "job.out").read_text() if (tmp_path / "job.out").exists() else cluster.logs()
    assert status == 0, output
    check_steps(tmp_path / "run")


def test_a_step_with_one_task_per_rank_is_recognised_and_trains(make_hosts, tmp_path):
    hosts = make_hosts(1)
    cluster = make_cluster(hosts, tmp_path / "slurm")
    pipeline = "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1"
    command = python_module("mrl.trainer.main_ppo", *job(1, 2, tmp_path / "run", pipeline))
    step = cluster.run(["srun", "--ntasks=2", "--kill-on-bad-exit=1", *command], tmp_path / "step.out")
    assert step.wait(280) == 0, step.output()
    check_steps(tmp_path / "run")
