"""Ranks that are killed or stopped in the middle of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_jobs import Outcome, run_command

pytestmark = pytest.mark.e2e

SMALL = [
    "--config-name=demo",
    "trainer.n_gpus_per_node=2",
    "trainer.total_training_steps=3",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "trainer.logger=[console,file]",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
    "critic.megatron.pipeline_model_parallel_size=1",
    "critic.ppo_micro_batch_size_per_gpu=4",
]


def run(folder: Path, *more: str, sent: str | None = None) -> Outcome:
    """A run in which the last rank gets the signal `sent` once, at the first reward after the checkpoint of step 2.

    Rewards are computed below rank 0, whose parent has all ranks; so no clock is involved.
    """
    path = folder / "reward.py"
    path.write_text(
        "import os, pathlib, signal, psutil\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    run, sent = pathlib.Path({str(folder / 'run')!r}), {sent!r}\n"
        "    if sent and (run / 'checkpoints/global_step_2').exists() and not (run / 'sent').exists():\n"
        "        (run / 'sent').touch()\n"
        "        launcher = psutil.Process().parents()[1]\n"
        "        last = max(launcher.children(), key=lambda child: child.pid)\n"
        "        os.kill(last.pid, getattr(signal, sent))\n"
        "    return float(len(solution_str) % 3)\n"
    )
    own = [f"trainer.default_local_dir={folder / 'run'}", f"reward.custom_reward_function.path={path}"]
    return run_command([*SMALL, "trainer.save_freq=1", *own, *more], folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Metrics of every step, without what depends on the clock or on the process's age."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "memory/", "train/", "per_s", "_s", "rollout/engine")
    return [{key: value for key, value in row.items() if not any(mark in key for mark in timed)} for row in rows]


def test_a_run_whose_rank_is_killed_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path):
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole = run(folders[0])
    assert whole.status == 0, whole.output
    broken = run(folders[1], "trainer.max_restarts=1", sent="SIGKILL")
    assert broken.status == 0, broken.output
    assert "rank 1 died with exit status -9" in broken.output
    assert "restart 1 of 1" in broken.output
    assert [row["step"] for row in rows_of(folders[1])] == [1, 2, 3]
    assert rows_of(folders[1]) == rows_of(folders[0])


def test_a_stopped_rank_ends_the_run_with_a_report_of_who_waits_for_it(tmp_path):
    # Longer than any phase of a loaded machine.
    outcome = run(tmp_path, "trainer.phase_timeouts_s={reward: 20, log_prob: 20}", sent="SIGSTOP")
    assert outcome.status == 1
    [report] = (tmp_path / "run").glob("hang-*.txt")
    text = report.read_text()
    assert re.search(r"rank 1 is silent: process \d+ is stopped", text)
    assert re.search(r"rank 0 is (waiting in|not in a collective)", text)
    assert '"step": 2' in text
    assert str(report) in outcome.output
