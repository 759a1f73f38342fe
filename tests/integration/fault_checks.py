"""What a fault job must show, on whatever devices it ran."""

from __future__ import annotations

from typing import Any

import pull_faults
from fault_jobs import LAST, Outcome

SAME_GIB = 0.2
"""Kernels that a process loads later and allocators' rests; a context, the least an engine process holds, is more."""


def check_first_update(outcome: Outcome) -> None:
    for seen in outcome.seen:
        assert (seen["first"]["error"], seen["first"]["generation"], seen["first"]["version"]) == ("", "", 0)
    parameters = outcome.seen[0]["first"]["parameters"]
    assert (parameters["before"], parameters["torn"]) == (0, 0)


def check_refusal_is_an_error_on_every_rank(outcome: Outcome) -> None:
    last = outcome.job.world_size - 1
    reason = f"rollout engine of rank 0: weight loader failed: engine rank {last}: RuntimeError: {pull_faults.REASON}"
    for seen in outcome.seen:
        assert seen["refused"]["error"].startswith(f"EngineError: {reason}")
        assert seen["refused"]["error"].count("engine rank ") == 1
        assert seen["refused"]["version"] == 0
        assert "engine cannot generate: the last weight update failed" in seen["refused"]["generation"]


def check_refusal_came_half_way(outcome: Outcome) -> None:
    seen = outcome.seen[0]["refused"]
    parameters = seen["parameters"]
    assert not seen["fault is left"]
    assert max(parameters["now"], parameters["before"]) < sum(parameters.values())
    assert seen["engine version"] == "0"


def check_next_update_repairs(outcome: Outcome) -> None:
    for seen in outcome.seen:
        assert (seen["repaired"]["error"], seen["repaired"]["generation"]) == ("", "")
        assert seen["repaired"]["version"] == 1
    _check_whole(outcome.seen[0]["repaired"], "1")


def check_engine_death_is_an_error_on_every_rank(outcome: Outcome) -> None:
    for seen in outcome.seen:
        error, generation = seen["engine killed"]["error"], seen["engine killed"]["generation"]
        assert error.startswith("EngineError: rollout engine of rank 0: engine died during update_weights (pid ")
        assert "exit code -9" in error
        assert "max_engine_restarts = 0 allows no more" in error
        assert "engine cannot be used: engine died during update_weights" in generation
        assert seen["engine killed"]["version"] == 1
    assert not outcome.seen[0]["engine killed"]["fault is left"]


def check_dead_engine_is_replaced(outcome: Outcome) -> None:
    for seen in outcome.seen:
        assert (seen["replaced"]["error"], seen["replaced"]["generation"]) == ("", "")
        assert (seen["replaced"]["version"], seen["replaced"]["left running"]) == (2, [])
        before, after = seen["replaced"]["device_gib"]
        assert after - before < SAME_GIB
    _check_whole(outcome.seen[0]["replaced"], "2")


def check_trainer_death_is_an_error_on_every_rank(outcome: Outcome) -> None:
    last = outcome.job.world_size - 1
    death = f"rank {last} died with exit status -9 (negative: killed by that signal)"
    assert outcome.failure == f"rank {last}: {death}"
    assert not outcome.job.fault.exists()
    for seen in outcome.seen[:-1]:
        assert seen["end"] == f"PeerFailedError: rank {last}: {death}"
        assert (seen[LAST]["version before"], seen[LAST]["version"]) == (2, 2)


def check_nothing_is_left(outcome: Outcome) -> None:
    assert outcome.left_running == []
    assert outcome.left_in_shm == []
    for before, after in outcome.device_gib:
        assert after - before < SAME_GIB


def _check_whole(seen: dict[str, Any], version: str) -> None:
    assert seen["parameters"]["now"] > 0
    assert (seen["parameters"]["before"], seen["parameters"]["torn"]) == (0, 0)
    assert seen["engine version"] == version


CHECKS = (
    check_first_update,
    check_refusal_is_an_error_on_every_rank,
    check_refusal_came_half_way,
    check_next_update_repairs,
    check_engine_death_is_an_error_on_every_rank,
    check_dead_engine_is_replaced,
    check_trainer_death_is_an_error_on_every_rank,
    check_nothing_is_left,
)
