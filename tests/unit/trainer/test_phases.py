"""The order in which trainer and engines hand the device to each other."""

from __future__ import annotations

import pytest

from mrl.interfaces import EngineError
from mrl.trainer.phases import ENGINE_TAGS, PhaseSwitch

GIB = 2**30
SIZES = {"weights": 3 * GIB, "kv_cache": 40 * GIB}


class Ledger:
    """Trainer roles, a rollout and their device at once; writes down what it is told, and who has how much.

    Two roles hold 20 GiB each, 5 of them gradients; 1 GiB of contexts and the actor's 3 GiB of weights stay.
    """

    def __init__(self, capacity=80 * GIB):
        self.capacity = capacity
        self.calls: list[str] = []
        self.held = {"residue": 1 * GIB, "weights of the actor": 3 * GIB, "gradients": 10 * GIB, "state": 30 * GIB}
        self.unused: list[str] = []
        self.peak = 0

    def take(self, name, size):
        self.held[name] = size
        self.peak = max(self.peak, self.in_use())
        assert self.in_use() <= self.capacity, f"out of memory, {self.held}"

    def release(self):
        self.calls.append("drop gradients")
        self.unused.append("gradients")

    def offload(self):
        self.calls.append("offload")
        self.unused.append("state")

    def onload(self):
        self.calls.append("onload")

    def release_memory(self, tags):
        self.calls.append(f"release {' '.join(tags)}")
        for tag in tags:
            del self.held[tag]

    def resume_memory(self, tags):
        self.calls.append(f"resume {' '.join(tags)}")
        for tag in tags:
            self.take(tag, SIZES[tag])

    def update_weights(self):
        self.calls.append("pull")
        return {"reshard/bytes": 8.0}

    def in_use(self):
        return sum(self.held.values())

    def free(self):
        return self.capacity - self.in_use()

    def reclaim(self):
        self.calls.append("reclaim")
        for name in self.unused:
            self.held.pop(name, None)
        self.unused = []

    def metrics(self, moment):
        return {f"memory/{moment}_gib": self.in_use() / GIB}

    def residue_metrics(self):
        return {"memory/residue_gib": self.held["residue"] / GIB}

    def train(self):
        self.take("gradients", 10 * GIB)
        self.take("state", 30 * GIB)


def switch(ledger, tags, device=True, **settings):
    roles = [ledger] if not device else [ledger, ledger]
    return PhaseSwitch(rollout=ledger, roles=roles, engine_tags=tags, device=ledger if device else None, **settings)


CAREFULLY = [
    *("drop gradients", "drop gradients", "reclaim", "offload", "offload", "reclaim"),
    *("resume weights", "pull", "reclaim", "resume kv_cache"),
]
OVERLAPPED = [
    *("drop gradients", "drop gradients", "reclaim", "offload", "offload"),
    *("resume weights", "pull", "reclaim", "resume kv_cache"),
]


def test_weights_come_during_the_offload_once_their_size_is_known_and_they_fit():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    phases.to_rollout()
    assert ledger.calls == CAREFULLY
    phases.to_training()
    ledger.train()
    ledger.calls.clear()
    phases.to_rollout()
    assert ledger.calls == OVERLAPPED


def test_ranks_without_an_engine_do_not_keep_the_others_from_overlapping():
    ledger = Ledger()
    switch(ledger, ENGINE_TAGS, holds_engine=False).to_rollout()
    assert ledger.calls == OVERLAPPED


def test_weights_wait_for_the_offload_where_they_do_not_fit_beside_it():
    # State, contexts and the actor's weights take 34 GiB, so 3 GiB fit at once only with room to spare.
    ledger = Ledger(capacity=47 * GIB)
    phases = switch(ledger, ENGINE_TAGS)
    phases.to_rollout()
    phases.to_training()
    ledger.train()
    ledger.capacity = 37 * GIB
    ledger.calls.clear()
    with pytest.raises(AssertionError, match="out of memory"):
        phases.to_rollout()
    assert ledger.calls == CAREFULLY, "the cache of 40 GiB cannot fit, but the weights were taken after the offload"


def test_a_dead_engine_is_not_taken_for_one_that_needs_nothing():
    class Mortal(Ledger):
        dead = False

        def resume_memory(self, tags):
            if self.dead:
                self.calls.append("nobody resumes")
            else:
                super().resume_memory(tags)

        def update_weights(self):
            if self.dead:
                self.dead = False
                for tag in ENGINE_TAGS:
                    self.take(tag, SIZES[tag])
            return super().update_weights()

    ledger = Mortal(capacity=100 * GIB)
    phases = switch(ledger, ENGINE_TAGS)
    for dead in (False, True, False):
        ledger.dead = dead
        phases.to_rollout()
        phases.to_training()
        ledger.train()
    # State, contexts and the actor's weights: 3 GiB of an engine's weights do not fit beside them.
    ledger.calls.clear()
    ledger.capacity = 37 * GIB
    with pytest.raises(AssertionError, match="out of memory"):
        phases.to_rollout()
    assert ledger.calls == CAREFULLY


def test_memory_is_reported_at_every_step_of_both_ways():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    first = phases.to_rollout()
    phases.to_training()
    ledger.train()
    second = phases.to_rollout()
    there = {"memory/train_gib": 44.0, "memory/released_gib": 34.0, "memory/offloaded_gib": 7.0, "reshard/bytes": 8.0}
    assert first == there | {"memory/weights_gib": 7.0, "memory/rollout_gib": 47.0}
    back = {"memory/generated_gib": 47.0, "memory/engines_released_gib": 4.0, "memory/residue_gib": 1.0}
    assert second == there | back | {"memory/weights_gib": 37.0, "memory/rollout_gib": 47.0}
    assert set(phases.timer.take()) == {"time/switch_s", "time/reshard_s"}
    assert ledger.peak == 47 * GIB


def test_many_switches_do_not_grow():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    seen = []
    for _ in range(50):
        phases.to_rollout()
        seen.append(dict(ledger.held))
        phases.to_training()
        ledger.train()
    assert all(held == seen[0] for held in seen)


def test_going_back_twice_releases_once():
    ledger = Ledger()
    phases = switch(ledger, ENGINE_TAGS)
    phases.to_rollout()
    phases.to_training()
    phases.to_training()
    assert ledger.calls.count("release kv_cache weights") == 1


def test_engines_that_keep_their_memory_are_never_asked_for_it():
    ledger = Ledger()
    phases = switch(ledger, (), device=False)
    metrics = phases.to_rollout()
    phases.to_training()
    assert ledger.calls == ["drop gradients", "offload", "pull", "onload"]
    assert metrics == {"reshard/bytes": 8.0}


def test_a_failed_pull_is_not_taken_for_a_rollout_phase():
    class Failing(Ledger):
        def update_weights(self):
            raise EngineError("no pull today")

    ledger = Failing()
    phases = switch(ledger, ENGINE_TAGS)
    with pytest.raises(EngineError, match="no pull today"):
        phases.to_rollout()
    assert "resume kv_cache" not in ledger.calls
