"""Metrics on their way to files and terminal."""

import json
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mrl.observability.console import format_step
from mrl.observability.timers import PhaseTimer
from mrl.observability.trackers import build_trackers


def test_every_step_is_one_json_object_and_nan_is_null(tmp_path):
    trackers = build_trackers(["file"], run_dir=tmp_path, total_steps=2)
    trackers.log({"reward/mean": 0.5}, step=1)
    first = (tmp_path / "metrics.jsonl").read_text()
    trackers.log({"reward/mean": float("nan")}, step=2)
    trackers.close()
    assert json.loads(first) == {"step": 1, "reward/mean": 0.5}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "reward/mean": None}


def test_tensorboard_events_hold_the_scalars(tmp_path):
    trackers = build_trackers(["tensorboard"], run_dir=tmp_path, total_steps=1)
    trackers.log({"actor/loss": 0.25}, step=7)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [(7, 0.25)]


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'mlflow'; known are console, tensorboard, wandb and file"):
        build_trackers(["mlflow"], run_dir=tmp_path, total_steps=1)


def test_weights_and_biases_gets_metrics_and_settings_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def log(step):
        about = {"project": "p", "experiment": "e", "settings": {"data": {"train_batch_size": 8}}}
        trackers = build_trackers(["wandb"], run_dir=tmp_path, total_steps=2, **about)
        trackers.log({"reward/mean": 0.5}, step=step)
        trackers.close()
        return (tmp_path / "wandb_id").read_text()

    first, resumed = log(1), log(2)
    assert first == resumed
    (tmp_path / "metrics.jsonl").unlink()
    assert log(1) != first
    written = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    assert written.count(b"reward/mean") >= 3
    assert b"train_batch_size" in written


def test_weights_and_biases_without_a_login_says_what_to_do(tmp_path):
    # In a process of its own: a package that was once offline stays so.
    script = (
        "import sys; from pathlib import Path; from mrl.observability.trackers import build_trackers; "
        "build_trackers(['wandb'], run_dir=Path(sys.argv[1]), total_steps=1, project='p', experiment='e')"
    )
    logged_out = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    outcome = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**logged_out, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 1
    assert "ValueError: trainer.logger names wandb, which does not start: " in outcome.stderr
    assert "WANDB_MODE=offline, or leave it out" in outcome.stderr


def test_the_step_line_leaves_out_absent_metrics():
    line = format_step({"reward/mean": 0.5, "time/step_s": 1.25}, step=3, total_steps=10)
    assert line == "step 3/10  reward 0.500  step 1.25s"


def test_the_timer_adds_up_phases_and_starts_again():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            pass
    with pytest.raises(RuntimeError, match="inside"), timer("reward"):
        raise RuntimeError("inside")
    metrics = timer.take()
    assert set(metrics) == {"time/rollout_s", "time/reward_s"}
    assert all(seconds >= 0 for seconds in metrics.values())
    assert timer.take() == {}
