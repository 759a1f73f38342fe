import math

import pytest

from mrl.interfaces import RewardError
from mrl.rewards.messages import Outcome
from mrl.rewards.part import RewardPart
from mrl.rewards.weighted import WeightedReward
from mrl.types import Generation, Prompt, Sample


class Scripted:
    """A part whose outcomes are given by the response."""

    def __init__(self, outcomes):
        self.outcomes = outcomes
        self.closed = 0

    def score(self, samples, *, stop_at_failure):
        return [self.outcomes[sample.response_text] for sample in samples]

    def close(self):
        self.closed += 1


def make_samples(*texts):
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    return [
        Sample(
            prompt=Prompt(uid=f"row {text}", token_ids=[1], messages=[], data_source="s"),
            generation=generation,
            response_text=text,
        )
        for text in texts
    ]


CORRECT = {"a": Outcome(1.0, {"steps": 3.0}), "b": Outcome(0.0, {}), "c": Outcome(0.0, {}, "raised KeyError")}
FORMAT = {"a": Outcome(0.5, {}), "b": Outcome(-2.0, {}), "c": Outcome(1.0, {})}


def test_reward_is_the_weighted_sum_with_every_part_unweighted_beside_it():
    parts = [
        RewardPart(name="correct", scorer=Scripted(CORRECT), weight=2.0, on_failure="raise"),
        RewardPart(name="format", scorer=Scripted(FORMAT), weight=-0.5, on_failure="raise"),
    ]
    assert WeightedReward(parts)(make_samples("b", "a")) == [
        (1.0, {"correct": 0.0, "format": -2.0}),
        (1.75, {"correct": 1.0, "correct/steps": 3.0, "format": 0.5}),
    ]


def test_a_failure_costs_its_part_only_and_is_counted(caplog):
    parts = [
        RewardPart(name="correct", scorer=Scripted(CORRECT), on_failure="zero"),
        RewardPart(name="format", scorer=Scripted(FORMAT), on_failure="raise"),
    ]
    (reward_a, info_a), (reward_c, info_c) = WeightedReward(parts)(make_samples("a", "c"))
    assert (reward_a, reward_c) == (1.5, 1.0)
    assert (info_a["failed"], info_a["correct/failed"]) == (0.0, 0.0)
    assert (info_c["failed"], info_c["correct/failed"], info_c["correct"]) == (1.0, 1.0, 0.0)
    assert "format/failed" not in info_c
    assert "1 of 2 samples could not be scored: score 0; first: the reward 'correct' of sample 'row c'" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_sample_that_can_be_scored_is_an_error_in_the_log(caplog):
    parts = [RewardPart(name="", scorer=Scripted(CORRECT), on_failure="zero")]
    assert WeightedReward(parts)(make_samples("c")) == [(0.0, {"failed": 1.0})]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_batch_of_failures_ends_the_run_where_single_ones_score_zero(caplog):
    parts = [RewardPart(name="", scorer=Scripted(CORRECT), on_failure="zero")]
    with pytest.raises(RewardError, match=r"none of 16 samples could be scored, first: .* 'row c' .* raised KeyError"):
        WeightedReward(parts)(make_samples(*"c" * 16))
    assert WeightedReward(parts)(make_samples("a", *"c" * 15))[1] == (0.0, {"failed": 1.0})
    assert "15 of 16 samples could not be scored" in caplog.text


def test_a_part_may_end_the_run_whatever_the_others_do():
    parts = [
        RewardPart(name="format", scorer=Scripted(FORMAT), on_failure="zero"),
        RewardPart(name="correct", scorer=Scripted(CORRECT), on_failure="raise"),
    ]
    with pytest.raises(RewardError, match=r"'correct' of sample 'row c' \(data_source 's'\) raised KeyError"):
        WeightedReward(parts)(make_samples("a", "c"))


def test_a_weight_of_zero_only_logs():
    parts = [
        RewardPart(name="correct", scorer=Scripted(CORRECT), weight=0.0, on_failure="raise"),
        RewardPart(name="format", scorer=Scripted(FORMAT), on_failure="raise"),
    ]
    assert WeightedReward(parts)(make_samples("a")) == [(0.5, {"correct": 1.0, "correct/steps": 3.0, "format": 0.5})]


def test_closing_closes_every_part():
    parts = [RewardPart(name=name, scorer=Scripted({})) for name in ("x", "y")]
    with WeightedReward(parts) as reward:
        assert reward([]) == []
    assert [part.scorer.closed for part in parts] == [1, 1]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'ignore' must be one of zero, raise"):
        RewardPart(name="x", scorer=Scripted({}), on_failure="ignore")


def test_parts_run_at_the_same_time():
    from threading import Barrier

    meeting = Barrier(2, timeout=60)

    class Waiting(Scripted):
        def score(self, samples, *, stop_at_failure):
            meeting.wait()
            return super().score(samples, stop_at_failure=stop_at_failure)

    parts = [RewardPart(name=name, scorer=Waiting(FORMAT), on_failure="raise") for name in ("x", "y")]
    [(reward, _)] = WeightedReward(parts)(make_samples("a"))
    assert math.isclose(reward, 1.0)


def test_without_parts_every_reward_is_zero_until_a_model_adds_to_it():
    assert WeightedReward([])(make_samples("a", "b")) == [(0.0, {}), (0.0, {})]
