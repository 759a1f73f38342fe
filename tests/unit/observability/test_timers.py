"""What a watchdog is told of the phases."""

import pytest

from mrl.observability.timers import OUTSIDE, PhaseTimer


def test_the_innermost_phase_is_told_at_its_begin_and_when_it_goes_on():
    told = []
    timer = PhaseTimer(told.append)
    with timer("step"):
        with timer("rollout"):
            pass
        with timer.watched("save"):
            pass
    assert told == ["step", "rollout", "step", "save", "step", OUTSIDE]
    assert set(timer.take()) == {"time/step_s", "time/rollout_s"}


def test_a_phase_that_failed_stays_the_current_one_until_the_next():
    told = []
    timer = PhaseTimer(told.append)
    with pytest.raises(KeyError), timer("step"), timer("rollout"):
        raise KeyError
    assert told == ["step", "rollout"]
    with timer("step"):
        pass
    assert told[2:] == ["step", OUTSIDE]
