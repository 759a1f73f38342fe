"""The recipes in examples/ as their scripts call them, a few steps each; runs without a critic, saved and resumed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_jobs import Outcome, run_command
from judge_server import served_judge

from mrl.data.embedded import materialise
from mrl.observability.report import summarize_run

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "trainer.total_training_steps": "2",
    "trainer.test_freq": "2",
    "trainer.val_before_train": "False",
    "trainer.save_freq": "-1",
    "data.val_max_samples": "4",
    "data.train_batch_size": "8",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "8",
    "trainer.logger": "[console,file]",
}


def run_example(name: str, folder: Path, *, judge_url: str = "", **more: str) -> tuple[Outcome, list[dict[str, float]]]:
    """The script's own command line, with smaller sizes at its end; and the metrics of all steps."""
    show = folder / "show_arguments.sh"
    show.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    show.chmod(0o755)
    settings = SMALL | {"trainer.default_local_dir": str(folder / "run")} | more
    overrides = [f"{key}={value}" for key, value in settings.items()]
    printed = subprocess.run(
        ["sh", str(EXAMPLES / f"{name}.sh"), *overrides],
        env={**os.environ, "PYTHON": str(show), "JUDGE_URL": judge_url},
        capture_output=True,
        text=True,
        check=True,
    )
    _, module, *arguments = printed.stdout.rstrip("\0").split("\0")
    assert module == "mrl.trainer.main_ppo"
    outcome = run_command(arguments, folder)
    metrics = folder / "run/metrics.jsonl"
    return outcome, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def read_samples(run: Path, step: int) -> list[dict[str, Any]]:
    """The samples of a step, with the row of each prompt in place of the run's own path to it."""
    samples = [json.loads(line) for line in (run / f"samples/train/{step}.jsonl").read_text().splitlines()]
    return [{**sample, "uid": sample["uid"].rpartition(":")[2]} for sample in samples]


def test_ppo_has_a_critic(tmp_path):
    outcome, rows = run_example("ppo_embedded", tmp_path, **{"critic.ppo_micro_batch_size_per_gpu": "4"})
    assert outcome.status == 0, outcome.output
    assert rows[-1]["critic/loss"] > 0
    assert "does not act" not in outcome.output


def test_grpo_runs_without_a_critic_and_resumes_its_checkpoints(tmp_path):
    outcome, rows = run_example("grpo_embedded", tmp_path, **{"trainer.save_freq": "2"})
    assert outcome.status == 0, outcome.output
    assert "none: advantages need no values" in outcome.output
    assert "does not act" not in outcome.output
    assert not [key for key in rows[-1] if key.startswith("critic/") or "critic" in key or "value" in key]
    assert rows[-1]["actor/kl_loss"] >= 0
    assert abs(rows[-1]["advantage/mean"]) < 1
    assert not list((tmp_path / "run/checkpoints/global_step_2").glob("critic*"))
    assert dict(summarize_run(tmp_path / "run"))["steps"] == "2"

    more = {"trainer.save_freq": "2", "trainer.total_training_steps": "3"}
    resumed, rows = run_example("grpo_embedded", tmp_path, **more)
    assert resumed.status == 0, resumed.output
    assert "resumed from step 2 of" in resumed.output
    assert [row["step"] for row in rows] == [1, 2, 3]

    more = {"trainer.total_training_steps": "4", "critic.ppo_micro_batch_size_per_gpu": "4"}
    with_critic, _ = run_example("ppo_embedded", tmp_path, **more)
    assert with_critic.status == 1
    assert "global_step_3 was written by a run without critic" in with_critic.output, with_critic.output
    assert "Traceback" not in with_critic.output


def test_rloo_takes_its_kl_penalty_before_the_comparison(tmp_path):
    outcome, rows = run_example("rloo_embedded", tmp_path)
    assert outcome.status == 0, outcome.output
    assert "does not act" not in outcome.output
    # The policy has left the reference after the first step, so rewards of a group differ even where scores do not.
    assert rows[-1]["actor/reward_kl"] != 0
    assert rows[-1]["advantage/abs_mean"] > 0


def test_experts_are_those_that_two_engines_chose(tmp_path):
    more = {
        "actor_rollout_ref.model.use_remove_padding": "True",
        "actor_rollout_ref.rollout.num_engines": "2",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": "1",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "4",
    }
    outcome, rows = run_example("moe_embedded", tmp_path, **more)
    assert outcome.status == 0, outcome.output
    assert "does not act" not in outcome.output
    for row in rows:
        # Any other experts, or these of another token, are another function: 1e-2 and more.
        assert row["parity/log_prob_abs_diff_max"] < 1e-5
        # After the first of two mini-batches the routers would choose otherwise here and there.
        assert 0 < row["actor/router_replay_changed_fraction"] < 0.5


def test_conversations_train_what_the_model_wrote_and_nothing_else(tmp_path):
    # Random weights end an answer within 16 tokens two times out of three.
    more = {
        "data.max_response_length": "40",
        "actor_rollout_ref.rollout.multi_turn.max_turn_length": "16",
        "critic.ppo_micro_batch_size_per_gpu": "4",
    }
    outcome, rows = run_example("multi_turn_embedded", tmp_path, **more)
    assert outcome.status == 0, outcome.output
    assert "does not act" not in outcome.output
    assert 1 < rows[-1]["response/turns_mean"] <= rows[-1]["response/turns_max"] == 2
    assert rows[-1]["rollout/environment_failed"] == 0
    # The trainer reads a whole conversation at once, and finds what the engine found turn by turn.
    assert all(row["parity/log_prob_abs_diff_max"] < 1e-5 for row in rows)
    samples = read_samples(tmp_path / "run", 2)
    for sample in samples:
        question, answers = sample["messages"][-1]["content"], sample["turns"][0::2]
        assert {turn["role"] for turn in answers} == {"assistant"}
        assert [turn["content"] for turn in sample["turns"][1::2]] == [question] * (len(answers) - 1)
        assert all(turn["content"] != sample["ground_truth"] for turn in answers[:-1])
    assert len({len(sample["turns"]) for sample in samples}) == 2


def test_an_environment_that_cannot_be_used_is_refused_before_anything_starts(tmp_path):
    more = {
        "actor_rollout_ref.rollout.multi_turn.environment.path": "/nowhere.py",
        "critic.ppo_micro_batch_size_per_gpu": "4",
    }
    outcome, _ = run_example("multi_turn_embedded", tmp_path, **more)
    assert outcome.status == 1
    assert "environment.path = /nowhere.py does not exist; give a Python file" in " ".join(outcome.output.split())


def test_dapo_fills_its_steps_with_prompts_that_have_a_spread_and_resumes_exactly(tmp_path):
    more = {"data.gen_batch_size": "12", "algorithm.filter_groups.max_num_gen_batches": "40", "trainer.save_freq": "1"}
    outcome, rows = run_example("dapo_embedded", tmp_path, **more)
    assert outcome.status == 0, outcome.output
    assert "does not act" not in outcome.output
    for row in rows:
        kept = row["rollout/groups_generated"] - row["rollout/groups_dropped"] - row["rollout/groups_surplus"]
        assert kept == 8
        assert row["rollout/groups_generated"] == 12 * row["rollout/gen_batches"]
        assert 0 <= row["reward/overlong"] <= 1
    second = read_samples(tmp_path / "run", 2)
    groups = [second[first : first + 8] for first in range(0, len(second), 8)]
    assert len(groups) == 8
    assert all(len({sample["reward_info"]["score"] for sample in group}) > 1 for group in groups)

    (tmp_path / "resumed").mkdir()
    path = str(tmp_path / "run/checkpoints/global_step_1")
    more |= {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": path, "trainer.save_freq": "-1"}
    resumed, _ = run_example("dapo_embedded", tmp_path / "resumed", **more)
    assert resumed.status == 0, resumed.output
    assert read_samples(tmp_path / "resumed/run", 2) == second


def test_remax_scores_a_greedy_response_to_each_prompt(tmp_path):
    more = {"algorithm.adv_estimator": "remax", "actor_rollout_ref.rollout.n": "1"}
    outcome, rows = run_example("rloo_embedded", tmp_path, **more)
    assert outcome.status == 0, outcome.output
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["actor/grad_norm"] > 0


def test_a_served_judge_adds_its_scores(tmp_path):
    model = materialise(tmp_path / "judge").actor_model
    with served_judge(model, tmp_path / "judge.log") as url:
        more = {"trainer.total_training_steps": "1", "trainer.test_freq": "1"}
        outcome, rows = run_example("judge_embedded", tmp_path, judge_url=url, **more)
    assert outcome.status == 0, outcome.output
    assert "does not act" not in outcome.output
    [row] = rows
    assert row["reward/mean"] == pytest.approx(row["reward/correct"] + 0.1 * row["reward/judge"], abs=1e-6)
    assert 0.0 < row["reward/judge"] < 9.0
    assert row["reward/judge/failed"] < 0.5
