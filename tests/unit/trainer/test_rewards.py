"""From section `reward` to what scores samples."""

from __future__ import annotations

import pytest

from mrl.config.load import load_config
from mrl.trainer.rewards import build_reward, check_rewards
from mrl.types import Generation, Prompt, Sample

LENGTH = """
def length(data_source, solution_str, ground_truth, extra_info=None, limit=4):
    return {"score": float(len(solution_str) <= limit), "characters": len(solution_str)}

def broken(data_source, solution_str, ground_truth, extra_info=None):
    return float("nan")
"""


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(LENGTH)
    return str(path)


def settings(*overrides):
    return load_config(list(overrides)).reward


def make_sample(text, *, data_source="math_dapo", ground_truth="4"):
    return Sample(
        prompt=Prompt(uid="row", token_ids=[1], messages=[], data_source=data_source, ground_truth=ground_truth),
        generation=Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1),
        response_text=text,
    )


def test_functions_verifiers_and_their_policies_come_from_the_configuration(reward_file):
    configured = settings(
        "reward.num_workers=1",
        "reward.verifiers={math_dapo: exact_match}",
        "reward.functions.correct={}",
        f"reward.functions.short={{path: {reward_file}, name: length, weight: 0.5, reward_kwargs: {{limit: 1}}}}",
        f"reward.functions.odd={{path: {reward_file}, name: broken}}",
    )
    check_rewards(configured, {"math_dapo"})
    with build_reward(configured) as reward:
        [(right, info), (wrong, _)] = reward([make_sample("4"), make_sample("= 4")])
    assert (right, wrong) == (1.5, 0.0)
    assert info == {
        "correct": 1.0,
        "correct/failed": 0.0,
        "short": 1.0,
        "short/characters": 1.0,
        "short/failed": 0.0,
        "odd": 0.0,
        "odd/failed": 1.0,
        "failed": 1.0,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.custom_reward_function.path=/nowhere/r.py"], r"reward: path = /nowhere/r\.py does not exist"),
        (["reward.functions.a.path=/nowhere/r.py"], r"reward\.functions\.a: path = /nowhere/r\.py does not exist"),
        ([], r"reward: no verifier for data_source 'trivia'"),
        (["reward.functions={a: {verifier: gsm8k}, b: {}}"], r"reward\.functions\.b: no verifier for data_source"),
        (["reward.judge.url=http://127.0.0.1:9/v1"], r"judge at http://127\.0\.0\.1:9/v1 does not answer"),
        (
            ["reward.judge={url: http://x/v1, score_regex: null, score_schema: {type: text}}"],
            r"not a JSON Schema: 'text'",
        ),
        (["reward.verifiers.trivia=exact"], r"'trivia': there is no verifier 'exact'"),
        (["reward.functions.a={verifier: gsm8k, reward_kwargs: {x: 1}}"], r"functions\.a: .*takes gsm8k_method, not x"),
        (
            ["reward.verifiers.trivia=exact_match", "reward.functions.a={reward_kwargs: {x: 1}}"],
            r"functions\.a: the verifier gsm8k takes gsm8k_method, not x",
        ),
    ],
)
def test_what_cannot_score_is_refused_before_anything_starts(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(settings(*overrides), {"openai/gsm8k", "trivia"})


def test_a_function_that_a_file_lacks_is_refused_when_ranks_start(reward_file):
    with pytest.raises(ValueError, match=r"no function 'lenght'; its functions are \['length', 'broken'\]"):
        build_reward(settings(f"reward.functions.a={{path: {reward_file}, name: lenght}}"))
