"""When a curve counts as another one."""

from __future__ import annotations

import pytest
from golden_curve import differences, tolerances


def test_the_tolerance_adds_five_times_the_spread_to_a_share_that_grows_to_one_percent():
    curves, again = {"a": [10.0, -40.0], "b": [10.0, 20.0]}, {"a": [10.0, -40.1], "b": [10.0, 20.0]}
    expected = {"a": [0.5 + 0.5 * (0.1 + 0.004), 0.5 + 0.4 + 0.004], "b": [0.5 * (0.1 + 0.002), 0.2 + 0.002]}
    found = tolerances(curves, again)
    assert found == {name: pytest.approx(values) for name, values in expected.items()}


def test_a_curve_beyond_its_tolerance_is_named_with_the_step_where_it_leaves():
    expected, allowed = {"a": [1.0, 2.0, 3.0], "b": [1.0]}, {"a": [0.1, 0.1, 0.6], "b": [0.1]}
    assert differences(expected, {"a": [1.05, 2.0, 3.5], "b": [1.0]}, allowed) == []
    (line,) = differences(expected, {"a": [1.0, 2.5, 3.7], "b": [1.0]}, allowed)
    assert line.startswith("a: 2.5 instead of 2 at step 2")
    assert line.endswith("at 2 of 3 steps")


def test_a_curve_that_is_short_or_not_a_number_is_another_one():
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0]}, {"a": [9.0, 9.0]}) == ["a: 1 steps instead of 2"]
    assert len(differences({"a": [1.0]}, {"a": [float("nan")]}, {"a": [9.0]})) == 1
