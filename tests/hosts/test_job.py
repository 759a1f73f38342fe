"""The training command over several hosts, started by torchrun with one task per host."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from namespaces import HostProcess, Hosts
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mrl.backends.megatron.preload import preload_megatron
from mrl.backends.sglang.preload import preload_sglang
from mrl.trainer import main_ppo

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
SMALL = [
    "--config-name=demo",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=2",
    "data.train_batch_size=8",
    f"{ACTOR}.ppo_mini_batch_size=8",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "critic.ppo_micro_batch_size_per_gpu=2",
    "trainer.logger=[console,file]",
]


def job(hosts: int, ranks_per_host: int, run: Path, *more: str) -> list[str]:
    shape = [f"trainer.nnodes={hosts}", f"trainer.n_gpus_per_node={ranks_per_host}"]
    return [*SMALL, *shape, f"trainer.default_local_dir={run}", *more]


def test_torchrun_with_one_task_per_host_trains(make_hosts, tmp_path):
    hosts = make_hosts(2)
    # The actor's second pipeline stage is on the second host, the one engine on both.
    arguments = job(
        2,
        2,
        tmp_path / "run",
        f"{ROLLOUT}.tensor_model_parallel_size=4",
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=host0:29400", "--rdzv-id=job"]
    command = [*torchrun, *meeting, "-m", "mrl.trainer.main_ppo", *arguments]
    environ = {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    processes = [hosts.run(host, command, tmp_path / f"log{host}", **environ) for host in range(2)]
    finish(processes)
    check_run(hosts, processes, tmp_path / "run")


@pytest.mark.parametrize(
    ("count", "ranks_per_host", "rollout_tp", "num_engines", "ipv6"),
    [(2, 4, 2, 3, False), (4, 2, 4, 2, True)],
    ids=["2 hosts ipv4, engines on each", "4 hosts ipv6, engines over two"],
)
def test_the_main_layout_trains_over_hosts(make_hosts, tmp_path, count, ranks_per_host, rollout_tp, num_engines, ipv6):
    preload_megatron()
    preload_sglang()
    hosts = make_hosts(count, ipv6=ipv6)
    engines = [f"{ROLLOUT}.tensor_model_parallel_size={rollout_tp}", f"{ROLLOUT}.num_engines={num_engines}"]
    arguments = job(count, ranks_per_host, tmp_path / "run", *engines)
    processes = [
        hosts.start(host, partial(run_agent, count, arguments), tmp_path / f"log{host}") for host in range(count)
    ]
    finish(processes)
    check_run(hosts, processes, tmp_path / "run")


def test_experts_and_conversations_of_engines_on_either_host_are_trained_on_both(make_hosts, tmp_path):
    preload_megatron()
    preload_sglang()
    hosts = make_hosts(2)
    environment = Path(__file__).parents[2] / "examples/environments/retry.py"
    arguments = job(
        2,
        2,
        tmp_path / "run",
        "actor_rollout_ref.model.path=embedded:moe_actor",
        f"{ACTOR}.megatron.pipeline_model_parallel_size=1",
        f"{ACTOR}.megatron.expert_model_parallel_size=4",
        f"{ACTOR}.megatron.sequence_parallel=True",
        f"{ACTOR}.megatron.router_replay.mode=R3",
        f"{ROLLOUT}.num_engines=2",
        "data.max_response_length=40",
        f"{ROLLOUT}.multi_turn.enable=True",
        f"{ROLLOUT}.multi_turn.max_turn_length=16",
        f"{ROLLOUT}.multi_turn.environment.path={environment}",
        f"reward.custom_reward_function.path={environment}",
    )
    processes = [hosts.start(host, partial(run_agent, 2, arguments), tmp_path / f"log{host}") for host in range(2)]
    finish(processes)
    check_run(hosts, processes, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["response/turns_mean"] > 1
    assert 0 <= rows[-1]["actor/router_replay_changed_fraction"] < 0.5


def run_agent(count: int, arguments: list[str]) -> int:
    """torchrun's agent of one host, with its task forked instead of started anew: that has everything imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    config = LaunchConfig(
        min_nodes=count,
        max_nodes=count,
        nproc_per_node=1,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint="host0:29400",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_task)(arguments)
    return 0


def run_task(arguments: list[str]) -> None:
    """A host's task."""
    sys.exit(main_ppo.main(arguments))


def finish(processes: list[HostProcess]) -> None:
    statuses = [process.wait(280) for process in processes]
    assert statuses == [0] * len(processes), "\n".join(process.output() for process in processes)


def check_run(hosts: Hosts, processes: list[HostProcess], run: Path) -> None:
    """Two steps with current weights; only host 0 speaks; no host keeps shared memory or a process."""
    check_steps(run)
    assert "Result" in processes[0].output()
    assert not any("step 1/2" in process.output() for process in processes[1:])
    for host in range(len(processes)):
        assert hosts.shared_memory(host) == set()
        assert hosts.processes(host) == []


def check_steps(run: Path) -> None:
    """Two steps with current weights, made once, and a checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["parity/log_prob_abs_diff_mean"] < 1e-4 for row in steps)
    assert [row["rollout/weight_version"] for row in steps] == [1.0, 2.0]
    assert (run / "checkpoints").is_dir()
