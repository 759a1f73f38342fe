"""Jobs on real Ray clusters of this machine: equal to those of the local launcher, and gone when they fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_jobs import Command, run_command
from listening import is_loopback, listening
from ray_cluster import ON_LOOPBACK, RayCluster, ray_cluster

from mrl.config.load import load_config, spell_config
from mrl.launch.ray_host import HostActor, TaskEnd, TaskSpec

pytestmark = pytest.mark.e2e

# Two ranks with whole models each, so that they may be on one host or on two. One engine: of two, which of them takes a
# prompt, and with it the numbers drawn for it, would be a matter of time.
SMALL = [
    "--config-name=demo",
    "trainer.n_gpus_per_node=2",
    "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "trainer.logger=[console,file]",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.optim.lr_decay_style=constant",
    "actor_rollout_ref.actor.optim.min_lr=0.0",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.num_engines=1",
    "critic.megatron.pipeline_model_parallel_size=1",
    "critic.ppo_micro_batch_size_per_gpu=4",
]


def job(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"trainer.default_local_dir={folder / 'run'}", *more]


def results(folder: Path) -> list[dict[str, float]]:
    """The metrics of the first two steps that are not measurements of time and memory."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()[:2]]
    measured = ("_s", "_gib", "/mfu", "/slowest_rank_ratio")
    return [{key: value for key, value in row.items() if not key.endswith(measured)} for row in rows]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[dict[str, float]]:
    """The results of the local launcher."""
    folder = tmp_path_factory.mktemp("local")
    outcome = run_command(job(folder, "trainer.launcher=local"), folder)
    assert outcome.status == 0, outcome.output
    return results(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(2) as running:
        yield running


@pytest.fixture
def joined(cluster, monkeypatch) -> RayCluster:
    """The cluster of two nodes, to which RAY_ADDRESS points."""
    for name, value in {**ON_LOOPBACK, "RAY_ADDRESS": cluster.address}.items():
        monkeypatch.setenv(name, value)
    return cluster


def differing(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, Any]:
    """What is not the same, by step and metric."""
    pairs = [(row, other, key) for row, other in zip(rows, expected, strict=True) for key in row.keys() | other.keys()]
    return {
        f"{row['step']}: {key}": (row.get(key), other.get(key))
        for row, other, key in pairs
        if row.get(key) != other.get(key)
    }


def test_one_host_equals_the_local_launcher_and_a_killed_rank_ends_the_job(tmp_path, expected):
    seen: dict[str, Any] = {}

    def during(command: Command) -> None:
        command.wait_for(r"\[host 0\] step 2/500")
        seen["addresses"] = listening(command.descendants())
        # A rank is what has an engine's processes below it.
        command.find("sglang::scheduler").parent().kill()

    own = ["trainer.launcher=ray", "ray_kwargs.ray_init.address=local", "ray_kwargs.ray_init.num_cpus=1"]
    outcome = run_command(job(tmp_path, *own, "trainer.total_training_steps=500"), tmp_path, during=during)
    assert outcome.status == 1, outcome.output
    assert re.search(r"host 0 \(127\.0\.0\.1\): .*rank \d", outcome.output), outcome.output
    assert differing(results(tmp_path), expected) == {}
    assert seen["addresses"]
    assert all(map(is_loopback, seen["addresses"])), seen["addresses"]


def test_two_hosts_equal_the_local_launcher(tmp_path, joined, expected):
    outcome = run_command(job(tmp_path, "trainer.nnodes=2", "trainer.n_gpus_per_node=1"), tmp_path)
    assert outcome.status == 0, outcome.output
    assert differing(results(tmp_path), expected) == {}
    assert "[host 0] step 2/2" in outcome.output
    assert (tmp_path / "run/logs/host-1.log").exists()
    assert joined.tasks() == []


def test_hosts_that_the_cluster_does_not_have_are_not_waited_for_for_ever(tmp_path, joined):
    own = ["trainer.nnodes=3", "trainer.n_gpus_per_node=1", "trainer.ray_wait_register_center_timeout=3"]
    start = time.monotonic()
    outcome = run_command(job(tmp_path, *own), tmp_path)
    assert outcome.status == 1
    assert "the Ray cluster does not have 3 hosts with 0 GPUs and 1 CPU each" in outcome.output, outcome.output
    assert "it has 2 nodes (127.0.0.1 with 0 GPUs and 1 CPU, 127.0.0.1 with" in outcome.output
    assert "Traceback" not in outcome.output
    assert time.monotonic() - start < 120
    assert not (tmp_path / "run").exists()


def test_a_host_s_own_error_is_the_driver_s(tmp_path):
    config = load_config([*SMALL[1:], "actor_rollout_ref.model.path=/nowhere/model"], "demo")
    environment = {
        "MRL_NODE_RANK": "0",
        "MRL_NNODES": "1",
        "MRL_HOST_ADDRESS": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    log = str(tmp_path / "log")
    spec = TaskSpec(config=spell_config(config), environment=environment, folder=str(tmp_path), log=log)
    *lines, end = HostActor().run(spec)
    assert isinstance(end, TaskEnd), lines
    assert end.status == 1, lines
    assert end.error is not None
    assert end.error.startswith("model folder /nowhere/model does not exist"), end


SLEEPING = """
import os, sys, time
sys.path[:] = {path!r}
from mrl.launch.lifeline import end_with_parent
from mrl.launch.ray_task import read_config
read_config()
end_with_parent(sys.stdin.fileno())
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""
LOSING = """
import os, signal, sys, time
if os.path.exists("lost"):
    sys.exit(0)
if os.environ["MRL_NODE_RANK"] == "0":
    open("started", "w").close()
    time.sleep(600)
while not os.path.exists("started"):
    time.sleep(0.01)
open("lost", "w").close()
os.kill(os.getppid(), signal.SIGKILL)
"""
"""A task of which the second host loses its actor, once the first host's runs; the next attempt ends well."""
DRIVER = """
import sys
from mrl.config.load import load_config
from mrl.launch import ray_driver
from mrl.launch.ray_host import HostActor
from mrl.observability.console import setup_logging

program = sys.argv[1]

class Other(HostActor):
    def __init__(self):
        super().__init__(program)

ray_driver.HostActor = Other
setup_logging(rank=0)
sys.exit(ray_driver.launch_on_ray(load_config(sys.argv[2:], "demo")))
"""


@contextmanager
def running_driver(folder: Path, program: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A driver whose hosts run another program than training; it is gone when the block ends."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, program, *job(folder, *more)[1:]],
        cwd=folder,
        env={**os.environ, "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def test_a_lost_host_is_replaced_and_the_others_start_again(tmp_path, joined):
    own = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.max_restarts=1", "trainer.save_freq=1"]
    with running_driver(tmp_path, LOSING, *own) as driver:
        output, _ = driver.communicate(timeout=280)
    assert driver.returncode == 0, output
    assert "host 1 (127.0.0.1): Ray lost the host" in output
    assert "a host was lost: restart 1 of 1, from the last checkpoint" in output


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_no_task_outlives_the_driver(tmp_path, joined, sent, status):
    with running_driver(tmp_path, SLEEPING) as driver:
        assert driver.stdout is not None
        task = next(int(line.split()[-1]) for line in driver.stdout if "[host 0] pid" in line)
        driver.send_signal(sent)
        assert driver.wait(timeout=120) == status
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(task).wait(timeout=120)
