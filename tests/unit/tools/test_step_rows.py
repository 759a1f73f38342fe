"""A step's share that is neither rollout nor a model's pass, worked out by hand."""

from __future__ import annotations

import pytest
from step_rows import overhead, phase_rows, rollout_rows

STEP = {
    "time/step_s": 10.0,
    "time/rollout_s": 4.0,
    "time/log_prob_s": 1.0,
    "time/ref_log_prob_s": 1.0,
    "time/value_s": 0.5,
    "time/update_critic_s": 1.0,
    "time/update_actor_s": 1.5,
    "time/reward_s": 0.3,
    "time/switch_s": 0.2,
    "time/slowest_rank_ratio": 1.0,
    "rollout/tokens_per_s": 950.0,
}


def test_overhead_counts_timed_phases_and_what_lies_between_them():
    assert overhead(STEP) == pytest.approx(0.1)


def test_rows_name_each_phase_the_rest_and_the_limit():
    rows = {row.metric: row for row in phase_rows("case", [STEP])}
    assert rows["time/reward"].value == 0.3
    assert rows["time/between phases"].value == pytest.approx(0.5)
    assert rows["time/step"].value == 10.0
    assert "time/slowest_rank_ratio" not in rows
    assert rows["overhead"].value == pytest.approx(10.0)
    assert rows["overhead"].ratio == pytest.approx(0.5)


def test_a_phase_that_only_some_steps_have_counts_with_0_in_the_others():
    rows = {row.metric: row for row in phase_rows("case", [STEP, STEP, {**STEP, "time/save_s": 0.4}])}
    assert rows["time/save"].value == 0.0


def test_rollout_is_compared_where_something_was_measured():
    (row,) = rollout_rows("case", [STEP], 1000.0)
    assert (row.limit, row.ratio) == (1000.0, 0.95)
    assert rollout_rows("case", [STEP], 0.0)[0].ratio is None
