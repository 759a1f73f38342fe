"""The order in which trainer and engines hand the device to each other."""

from __future__ import annotations

import pytest

from mrl.interfaces import EngineError
from mrl.trainer.phases import ENGINE_TAGS, PhaseSwitch


class Ledger:
    """A trainer role and a rollout at once; writes down what it is told."""

    def __init__(self):
        self.calls: list[str] = []

    def offload(self):
        self.calls.append("offload")

    def onload(self):
        self.calls.append("onload")

    def release_memory(self, tags):
        self.calls.append(f"release {' '.join(tags)}")

    def resume_memory(self, tags):
        self.calls.append(f"resume {' '.join(tags)}")

    def update_weights(self):
        self.calls.append("pull")
        return {"reshard/bytes": 8.0}


def switch(ledger, tags):
    sizes = iter([40.0, 60.0, 41.0, 61.0])
    return PhaseSwitch(rollout=ledger, roles=[ledger], engine_tags=tags, allocated_gib=lambda: next(sizes))


def test_nothing_is_taken_before_the_other_side_has_given_back():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    metrics = phases.to_rollout()
    phases.to_training()
    phases.to_rollout()
    there = ["offload", "resume weights", "pull", "resume kv_cache"]
    assert ledger.calls == [*there, "release kv_cache weights", "onload", *there]
    assert metrics == {"memory/train_gib": 40.0, "reshard/bytes": 8.0, "memory/rollout_gib": 60.0}
    assert set(phases.timer.take()) == {"time/switch_s", "time/reshard_s"}


def test_going_back_twice_releases_once():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    phases.to_rollout()
    phases.to_training()
    phases.to_training()
    assert ledger.calls.count("release kv_cache weights") == 1


def test_engines_that_keep_their_memory_are_never_asked_for_it():
    ledger = Ledger()
    phases = switch(ledger, ())
    phases.to_rollout()
    phases.to_training()
    assert ledger.calls == ["offload", "pull", "onload"]


def test_a_failed_pull_is_not_taken_for_a_rollout_phase():
    class Failing(Ledger):
        def update_weights(self):
            raise EngineError("no pull today")

    ledger = Failing()
    phases = switch(ledger, ENGINE_TAGS)
    with pytest.raises(EngineError, match="no pull today"):
        phases.to_rollout()
    assert "resume kv_cache" not in ledger.calls
