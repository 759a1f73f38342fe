"""Sums over a device's timeline, on timelines worked out by hand."""

from __future__ import annotations

import pytest
from kernel_times import summarize


def event(name, start, duration, cat="kernel"):
    return {"name": name, "cat": cat, "ts": start, "dur": duration}


def test_overlapping_kernels_count_once_as_busy_and_each_in_its_own_sum():
    times = summarize([event("a", 0, 100), event("b", 50, 100), event("a", 1150, 50)])
    assert times.span_ms == pytest.approx(1.2)
    assert times.busy_ms == pytest.approx(0.2)
    assert times.kernels == [("a", pytest.approx(0.15), 2), ("b", pytest.approx(0.1), 1)]
    assert [(gap.us, gap.before, gap.after) for gap in times.gaps] == [(1000, "b", "a")]


def test_a_gap_after_a_long_kernel_begins_at_its_end_not_at_that_of_the_one_started_last():
    times = summarize([event("long", 0, 1000), event("short", 10, 10), event("next", 1500, 10)])
    assert [(gap.us, gap.before) for gap in times.gaps] == [(500, "long")]


def test_short_gaps_are_idle_time_but_not_listed_and_copies_are_work():
    times = summarize([event("a", 0, 10), event("copy", 14, 10, "gpu_memcpy"), event("op", 14, 900, "cpu_op")])
    assert times.busy_ms == pytest.approx(0.020)
    assert times.span_ms == pytest.approx(0.024)
    assert times.gaps == []


def test_a_timeline_without_kernels_is_an_error():
    with pytest.raises(ValueError, match="no kernel"):
        summarize([event("op", 0, 5, "cpu_op")])
