"""Traces of chosen steps, and the phases in them."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from mrl.observability.profiler import StepProfiler, phase_range
from mrl.observability.timers import PhaseTimer


def read_events(path):
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def run_steps(folder, steps):
    profiler, timer = StepProfiler(steps, folder=folder, rank=3, device="cpu"), PhaseTimer(span=phase_range)
    for step in (1, 2, 3):
        with profiler(step), timer("step"), timer("rollout"):
            torch.ones(2) + 1


def test_a_chosen_step_leaves_a_trace_that_names_its_phases(tmp_path):
    run_steps(tmp_path / "profile", [2])
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step_2_rank_3.json.gz"
    events = {event["name"]: event for event in read_events(path) if event.get("ph") == "X"}
    step, rollout, add = events["phase/step"], events["phase/rollout"], events["aten::add"]
    for outer, inner in ((step, rollout), (rollout, add)):
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_each_chosen_step_has_a_trace_of_its_own(tmp_path):
    run_steps(tmp_path, [1, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1_rank_3.json.gz", "step_3_rank_3.json.gz"]
    for path in tmp_path.iterdir():
        assert [event["name"] for event in read_events(path)].count("phase/step") == 1


def test_without_chosen_steps_nothing_is_written(tmp_path):
    run_steps(tmp_path / "profile", [])
    assert not (tmp_path / "profile").exists()


def test_a_step_that_fails_fails_as_without_a_profiler(tmp_path):
    profiler = StepProfiler([1], folder=tmp_path, rank=0, device="cpu")
    with pytest.raises(KeyError, match="lost"), profiler(1), phase_range("rollout"):
        raise KeyError("lost")
    assert not torch.autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())
