"""A training job that loses a host goes on from its last checkpoint, on the hosts that are left."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from host_jobs import host_environment
from namespaces import HostProcess, Hosts

from mrl.backends.megatron.preload import preload_megatron
from mrl.backends.sglang.preload import preload_sglang
from mrl.trainer import main_ppo

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
# No phase of this job takes a second; on a loaded machine one must still not reach the deadline.
DEADLINE_S = 40
PATIENCE_S = 240
SMALL = [
    "--config-name=demo",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
    f"trainer.phase_timeout_s={DEADLINE_S}",
    "trainer.phase_timeouts_s={start: 200, loop: 200}",
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.num_engines=2",
    f"{ACTOR}.ppo_mini_batch_size=8",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "critic.ppo_micro_batch_size_per_gpu=2",
    "trainer.logger=[console,file]",
]


def start(hosts: Hosts, run: Path, folder: Path, *, ranks_per_host: int, steps: int) -> list[HostProcess]:
    """The training command on every host, with one task for each."""
    count = len(hosts.names)
    shape = [f"trainer.nnodes={count}", f"trainer.n_gpus_per_node={ranks_per_host}"]
    arguments = [*SMALL, *shape, f"trainer.total_training_steps={steps}", f"trainer.default_local_dir={run}"]
    environ = {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    return [
        hosts.start(
            host, partial(main_ppo.main, arguments), folder / f"log{host}", **host_environment(hosts, host), **environ
        )
        for host in range(count)
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(run: Path, step: int, processes: list[HostProcess]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(row["step"] >= step for row in metrics(run)):
        assert time.monotonic() < deadline, [process.output() for process in processes]
        assert all(process.poll() is None for process in processes), [process.output() for process in processes]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (1, "is silent: its process, or its host, does not answer"),
        (0, "died with exit status 1 (negative: killed by that signal); host 0 cannot be asked why"),
    ],
    ids=["the second host", "the host of the job's store"],
)
def test_a_job_goes_on_without_the_host_that_it_lost(make_hosts, tmp_path, lost, said):
    preload_megatron()
    preload_sglang()
    run, hosts = tmp_path / "run", make_hosts(2)
    processes = start(hosts, run, tmp_path, ranks_per_host=2, steps=1000)
    wait_for_step(run, 2, processes)
    # Without the cable first, its kernel would still close the connections.
    hosts.set_link(lost, "down")
    hosts.shut_down(lost)
    kept = 1 - lost
    assert processes[kept].wait(DEADLINE_S + 120) == 1
    assert said in processes[kept].output(), processes[kept].output()
    assert hosts.processes(kept) == []
    assert hosts.shared_memory(kept) == set()

    last = max(row["step"] for row in metrics(run))
    left, again = make_hosts(1), tmp_path / "again"
    again.mkdir()
    [alone] = start(left, run, again, ranks_per_host=4, steps=last + 2)
    assert alone.wait(PATIENCE_S) == 0, alone.output()
    steps = [row["step"] for row in metrics(run) if row["step"] > 0]
    assert steps == list(range(1, last + 3))
    assert metrics(run)[-1]["parity/log_prob_abs_diff_mean"] < 1e-4
