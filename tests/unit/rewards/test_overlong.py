"""DAPO's penalty on long responses."""

from __future__ import annotations

import pytest

from mrl.rewards.overlong import OverlongPenalty
from mrl.types import Generation, Prompt, Sample


def make_sample(length, reward, **info):
    generation = Generation(
        response_ids=[7] * length, rollout_log_probs=[0.0] * length, finish_reason="stop", weight_version=0
    )
    prompt = Prompt(uid="p", token_ids=[1], messages=[], data_source="s")
    return Sample(prompt=prompt, generation=generation, reward=reward, reward_info=info)


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (16, 0.0), (17, -0.125), (18, -0.25), (20, -0.5)])
def test_the_penalty_grows_over_the_buffer(length, expected):
    # A limit of 20 with a buffer of 4: from 16 tokens on, an eighth for each.
    penalty = OverlongPenalty(max_resp_len=20, buffer_len=4, penalty_factor=0.5, log=False)
    assert penalty.compute(length) == expected


def test_rewards_are_lowered_and_the_score_is_kept():
    penalty = OverlongPenalty(max_resp_len=20, buffer_len=4, penalty_factor=1.0, log=True)
    sample = make_sample(18, 1.0, format=0.5)
    short, long = penalty.apply([make_sample(3, 0.25), sample])
    assert (short.reward, short.reward_info) == (0.25, {"score": 0.25, "overlong_reward": 0.0, "overlong": 0.0})
    assert long.reward == 0.5
    assert long.reward_info == {"score": 1.0, "format": 0.5, "overlong_reward": -0.5, "overlong": 1.0}
    assert (sample.reward, sample.reward_info) == (1.0, {"format": 0.5}), "the sample given is left alone"


def test_a_score_that_the_function_names_itself_is_not_replaced():
    (sample,) = OverlongPenalty(max_resp_len=4, buffer_len=2, penalty_factor=1.0, log=False).apply(
        [make_sample(4, 1.0, score=0.75)]
    )
    assert (sample.reward, sample.reward_info) == (0.0, {"score": 0.75})
