"""A generative judge: a language model that SGLang serves, asked over HTTP."""

from __future__ import annotations

import pytest
from judge_server import served_judge

from mrl.data.embedded import materialise
from mrl.rewards.judge import JudgeReward, JudgeSettings, ScoreFormat
from mrl.rewards.messages import Outcome
from mrl.types import Generation, Prompt, Sample

pytestmark = pytest.mark.engine


def make_sample(question: str, response: str) -> Sample:
    prompt = Prompt(
        uid=question, token_ids=[1], messages=[{"role": "user", "content": question}], data_source="s", ground_truth=""
    )
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    return Sample(prompt=prompt, generation=generation, response_text=response)


def test_a_model_that_sglang_serves_judges_samples(tmp_path):
    model = materialise(tmp_path).actor_model
    samples = [make_sample("345", "6789"), make_sample("5", "6")]

    def judge(url: str, regex: str) -> list[Outcome]:
        settings = JudgeSettings(
            url=url, prompt_template="{prompt}{response}", score=ScoreFormat(regex=regex), max_new_tokens=6
        )
        return JudgeReward(settings).score(samples, stop_at_failure=False)

    with served_judge(model, tmp_path / "judge.log") as url:
        first, again = judge(url, r"(\d)"), judge(url, r"(\d)")
        # The model's alphabet has digits only.
        unreadable = judge(url, "score: (x)")
    assert first == again, "the judge is greedy"
    assert [outcome.error for outcome in first] == [None, None]
    assert all(outcome.score in range(10) for outcome in first)
    assert all("got an answer without 'score: (x)'" in str(outcome.error) for outcome in unreadable)
