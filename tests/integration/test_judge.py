"""A generative judge: a language model that SGLang serves, asked over HTTP."""

from __future__ import annotations

import time

import pytest
from judge_server import expect_nothing_left, family_of, forked_judge, served_judge

from mrl.backends.sglang.server import find_token
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


def test_a_model_that_sglang_serves_judges_samples(tmp_path, monkeypatch):
    model = materialise(tmp_path).actor_model
    samples = [make_sample("345", "6789"), make_sample("5", "6")]

    monkeypatch.setenv("JUDGE_TOKEN", "open sesame")

    def judge(url: str, regex: str, api_key_env: str | None = "JUDGE_TOKEN") -> list[Outcome]:
        settings = JudgeSettings(
            url=url,
            model=str(model),
            prompt_template="{prompt}{response}",
            score=ScoreFormat(regex=regex),
            max_new_tokens=6,
            api_key_env=api_key_env,
        )
        return JudgeReward(settings).score(samples, stop_at_failure=False)

    with served_judge(model, tmp_path / "judge.log", token="open sesame") as url:
        first, again = judge(url, r"(\d)"), judge(url, r"(\d)")
        # The model's alphabet has digits only.
        unreadable = judge(url, "score: (x)")
        refused = judge(url, r"(\d)", api_key_env=None)
    assert first == again, "the judge is greedy"
    assert [outcome.error for outcome in first] == [None, None]
    assert all(outcome.score in range(10) for outcome in first)
    assert all("got an answer without 'score: (x)'" in str(outcome.error) for outcome in unreadable)
    assert all("AuthenticationError" in str(outcome.error) for outcome in refused)


def test_a_judge_killed_while_it_starts_leaves_nothing(tmp_path):
    log = tmp_path / "judge.log"
    with forked_judge(materialise(tmp_path).actor_model, log) as (process, _, files):
        deadline = time.monotonic() + 120
        # Shared memory, which the scheduler makes.
        while not any(name.startswith("sglang_loads_") for name in files()):
            assert time.monotonic() < deadline, log.read_text()
            assert process.is_alive(), log.read_text()
            time.sleep(0.05)
        family = family_of(process)
        process.kill()
        expect_nothing_left(family, files, log)


def test_a_judge_that_other_hosts_can_ask_needs_a_token(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "open sesame")
    monkeypatch.delenv("OTHER", raising=False)
    assert find_token("127.0.0.1", None, []) == find_token("::1", None, []) == find_token("localhost", None, []) == {}
    assert find_token("0.0.0.0", "JUDGE_TOKEN", []) == {"api_key": "open sesame"}
    assert find_token("gpu7", None, ["--tp", "2", "--api-key=x"]) == {}
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu7"):
        with pytest.raises(ValueError, match=f"--host {host} lets other hosts ask, so requests need a token"):
            find_token(host, None, ["--tp", "2"])
    with pytest.raises(ValueError, match="OTHER is not set"):
        find_token("127.0.0.1", "OTHER", [])
