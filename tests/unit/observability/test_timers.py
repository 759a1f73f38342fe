"""What a watchdog is told of the phases."""

from contextlib import contextmanager

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


def test_a_span_is_entered_for_every_phase_timed_or_watched_and_left_after_an_exception():
    open_spans, seen = [], []

    @contextmanager
    def span(phase):
        open_spans.append(phase)
        seen.append(tuple(open_spans))
        try:
            yield
        finally:
            open_spans.pop()

    timer = PhaseTimer(span=span)
    with timer("step"), timer("rollout"):
        pass
    with pytest.raises(KeyError), timer("step"), timer.watched("save"):
        raise KeyError
    assert seen == [("step",), ("step", "rollout"), ("step",), ("step", "save")]
    assert not open_spans
