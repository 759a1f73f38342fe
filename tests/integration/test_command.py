"""The training command as a user runs it: outputs, bad input, interrupted runs, verl's own command lines."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_jobs import Command, run_command
from omegaconf import OmegaConf

from mrl.data.embedded import materialise

pytestmark = pytest.mark.e2e

SMALL = [
    "--config-name=demo",
    "trainer.n_gpus_per_node=4",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "data.train_batch_size=8",
    "data.val_max_samples=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
    "critic.ppo_micro_batch_size_per_gpu=4",
    "trainer.logger=[console,tensorboard,file]",
]


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    return materialise(tmp_path_factory.mktemp("embedded"))


def in_folder(path: Path, *more: str) -> list[str]:
    return [*SMALL, f"trainer.default_local_dir={path / 'run'}", *more]


def test_a_run_writes_its_outputs_and_reports_them(tmp_path):
    traced = ["trainer.profile_steps=[2]", "trainer.profile_ranks=[1]"]
    more = ["algorithm.use_kl_in_reward=True", "actor_rollout_ref.rollout.alias_weights=True"]
    outcome = run_command(in_folder(tmp_path, *more, *traced), tmp_path)
    assert outcome.status == 0, outcome.output
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    last = rows[-1]
    # Of engines whose weights are partly the actor's memory.
    assert last["parity/log_prob_abs_diff_mean"] < 1e-4
    assert last["reshard/aliased_bytes"] > last["reshard/bytes"] / 2 > 0
    assert [row.get("rollout/weight_version") for row in rows[1:]] == [1.0, 2.0]
    expected = """reward/mean val/reward_mean response/length_mean actor/loss actor/kl actor/entropy actor/clip_fraction
        actor/grad_norm critic/loss critic/explained_variance parity/log_prob_abs_diff_mean rollout/tokens_per_s
        reshard/bytes reshard/gb_per_s time/rollout_s time/reward_s time/log_prob_s time/value_s time/update_actor_s
        time/update_critic_s time/reshard_s time/step_s memory/peak_gib actor/reward_kl"""
    assert set(expected.split()) <= set(last)
    assert OmegaConf.load(run / "config.yaml").trainer.total_training_steps == 2
    samples = [json.loads(line) for line in (run / "samples/train/2.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert {sample["weight_version"] for sample in samples} == {1}
    assert list((run / "samples/val").iterdir())
    assert list((run / "tensorboard").iterdir())
    assert phases_traced(run / "profile/step_2_rank_1.json.gz") >= {"step", "rollout", "update_actor", "reshard"}
    assert len(list((run / "profile").iterdir())) == 1
    assert "validation reward" in outcome.output


def phases_traced(path: Path) -> set[str]:
    with gzip.open(path) as trace:
        names = {event.get("name", "") for event in json.load(trace)["traceEvents"]}
    return {name.removeprefix("phase/") for name in names if name.startswith("phase/")}


def test_the_same_command_twice_keeps_the_first_runs_metrics(tmp_path):
    arguments = in_folder(tmp_path, "trainer.val_only=True")
    assert run_command(arguments, tmp_path).status == 0
    first = (tmp_path / "run/metrics.jsonl").read_text()
    assert run_command(arguments, tmp_path).status == 0
    kept = list((tmp_path / "run").glob("metrics.until-*.jsonl"))
    assert [path.read_text() for path in kept] == [first]


def empty_parquet(folder: Path) -> str:
    columns = {name: pa.array([], pa.string()) for name in ("prompt", "data_source", "reward_model")}
    pq.write_table(pa.table(columns), folder / "empty.parquet")
    return str(folder / "empty.parquet")


def wrong_column(folder: Path) -> str:
    pq.write_table(pa.table({"question": ["1 2 3"]}), folder / "column.parquet")
    return str(folder / "column.parquet")


def no_weights(folder: Path, embedded) -> str:
    model = folder / "no_weights"
    model.mkdir()
    for path in embedded.actor_model.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    return str(model)


BAD_INPUT = {
    "missing parquet": (lambda folder, _: "data.train_files=/nowhere/train.parquet", r"/nowhere/train\.parquet"),
    "empty parquet": (lambda folder, _: f"data.train_files={empty_parquet(folder)}", r"empty\.parquet.*no rows"),
    "wrong column": (lambda folder, _: f"data.train_files={wrong_column(folder)}", "column 'prompt'.*question"),
    "no model": (lambda *_: "actor_rollout_ref.model.path=/nowhere/model", "/nowhere/model does not exist"),
    "world": (
        lambda *_: "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3",
        "does not divide world size 4",
    ),
    "heads": (
        lambda *_: (
            "critic.megatron.tensor_model_parallel_size=3 trainer.n_gpus_per_node=6 "
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2"
        ),
        "critic.megatron.*num_attention_heads",
    ),
    "layers": (lambda *_: "critic.megatron.pipeline_model_parallel_size=4 trainer.n_gpus_per_node=12", "layers"),
    "engine heads": (lambda *_: "actor_rollout_ref.rollout.tensor_model_parallel_size=3", "does not divide the job's"),
    "too long": (lambda *_: "data.max_response_length=4096", "max_position_embeddings"),
    "batch": (lambda *_: "data.train_batch_size=100000", "number of prompts"),
    "typo": (lambda *_: "trainer.totl_epochs=1", "total_epochs"),
    "step to trace": (
        lambda *_: "trainer.total_training_steps=null trainer.total_epochs=1 trainer.profile_steps=[257]",
        r"trainer\.profile_steps names step 257; the run has 256",
    ),
    "reward file": (lambda *_: "reward.custom_reward_function.path=/nowhere/reward.py", "/nowhere/reward.py does not"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_fails_before_any_rank_starts_and_writes_nothing(tmp_path, embedded, case):
    arguments, message = BAD_INPUT[case]
    outcome = run_command(in_folder(tmp_path, *arguments(tmp_path, embedded).split()), tmp_path)
    assert outcome.status in (1, 2)
    assert "Traceback" not in outcome.output
    assert re.search(message, outcome.output), outcome.output
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert "forking" not in outcome.output


REWARDS = {
    "raises": ("raise KeyError('no such answer')", "no such answer"),
    "returns nan": ("return float('nan')", "nan"),
    "hangs": ("import time; time.sleep(60)", "took longer than its time limit of 2 s"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_function_that_fails_ends_the_run_and_names_the_sample(tmp_path, case):
    body, message = REWARDS[case]
    path = tmp_path / "reward.py"
    path.write_text(f"def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    {body}\n")
    own = [f"reward.custom_reward_function.path={path}", f"reward.timeout_s={2 if case == 'hangs' else 60}"]
    outcome = run_command(
        in_folder(tmp_path, *own, "reward.on_failure=raise", "trainer.val_before_train=False"), tmp_path
    )
    assert outcome.status == 1
    assert "embedded/counting" in outcome.output, outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_a_reward_function_that_fails_costs_the_samples_their_reward(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return 1.0 if ground_truth.startswith('9') else float('nan')\n"
    )
    own = [
        f"reward.functions.odd.path={path}",
        "reward.functions.rule.weight=0.5",
        "trainer.val_before_train=False",
        "trainer.total_training_steps=1",
        "trainer.test_freq=-1",
    ]
    outcome = run_command(in_folder(tmp_path, *own), tmp_path)
    assert outcome.status == 0, outcome.output
    assert "samples could not be scored: score 0; first: the reward 'odd'" in outcome.output
    [row] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["reward/failed"] == row["reward/odd/failed"] == 1.0 - row["reward/odd"] > 0.0
    assert row["reward/mean"] == pytest.approx(row["reward/odd"] + 0.5 * row["reward/rule"])


def test_a_model_folder_without_weights_is_named(tmp_path, embedded):
    outcome = run_command(in_folder(tmp_path, f"critic.model.path={no_weights(tmp_path, embedded)}"), tmp_path)
    assert outcome.status == 1
    assert "no_weights" in outcome.output
    assert "safetensors" in outcome.output
    assert "Traceback" not in outcome.output


def test_an_engine_that_cannot_start_is_reported_with_its_own_error(tmp_path):
    own = "actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=no_such_backend"
    outcome = run_command(in_folder(tmp_path, own), tmp_path)
    assert outcome.status == 1
    assert "no_such_backend" in outcome.output, outcome.output


def test_a_run_outlives_a_killed_engine(tmp_path):
    def during(command: Command) -> None:
        command.wait_for(r"step 1/500")
        command.find("scheduler").kill()
        command.wait_for(r"restarted after .*step \d+/500.*step \d+/500.*step \d+/500")
        os.kill(command.pid, signal.SIGTERM)

    outcome = run_command(in_folder(tmp_path, "trainer.total_training_steps=500"), tmp_path, during=during)
    assert outcome.status == 130
    assert len(re.findall("engine died", outcome.output)) == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["step"] > 0]
    assert sum(row["rollout/engine_restarts"] for row in trained) == 1
    assert [row["rollout/weight_version"] for row in trained] == [row["step"] for row in trained]
    # Weights of another version, or of none, would show here.
    assert max(row["parity/log_prob_abs_diff_mean"] for row in trained) < 1e-4


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, sent):
    def during(command: Command) -> None:
        command.wait_for(r"step 1/500")
        # A terminal sends SIGINT to the whole foreground group, a scheduler SIGTERM to one process.
        os.killpg(command.pid, sent) if sent == signal.SIGINT else os.kill(command.pid, sent)

    outcome = run_command(in_folder(tmp_path, "trainer.total_training_steps=500"), tmp_path, during=during)
    assert outcome.status == 130
    assert "interrupted" in outcome.output
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] >= 1


def test_ranks_die_with_a_killed_launcher(tmp_path):
    with Command(in_folder(tmp_path, "trainer.total_training_steps=500"), tmp_path / "output.txt") as command:
        command.wait_for(r"step 1/500")
        os.kill(command.pid, signal.SIGKILL)
        assert command.finish().status == -signal.SIGKILL


def sizes(embedded, folder: Path, world_size: int) -> dict[str, str]:
    """What a stand-in replaces in a command made for real models: paths, device counts and sizes."""
    return {
        "data.train_files": str(embedded.train_file),
        "data.val_files": str(embedded.val_file),
        "actor_rollout_ref.model.path": str(embedded.actor_model),
        "critic.model.path": str(embedded.critic_model),
        "data.train_batch_size": "8",
        "data.max_prompt_length": "32",
        "data.max_response_length": "8",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "2",
        "critic.ppo_micro_batch_size_per_gpu": "2",
        "critic.ppo_micro_batch_size": "8",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": "2",
        "actor_rollout_ref.rollout.max_num_seqs": "16",
        "trainer.n_gpus_per_node": str(world_size),
        "trainer.nnodes": "1",
        "trainer.total_training_steps": "2",
        "trainer.test_freq": "2",
        "trainer.default_local_dir": str(folder / "run"),
    }


EXTRA = ("trainer.total_training_steps", "trainer.default_local_dir", "actor_rollout_ref.rollout.max_num_seqs")


@pytest.mark.parametrize("command", ["single_host", "two_hosts"])
def test_verls_published_commands_run_on_stand_ins(tmp_path, embedded, command):
    published = (Path(__file__).parents[1] / f"data/verl_{command}.txt").read_text().split()
    replaced = sizes(embedded, tmp_path, world_size=4)
    arguments = []
    for argument in published:
        key, value = argument.split("=", 1)
        arguments.append(f"{key}={replaced.get(key, value)}")
    outcome = run_command([*arguments, *(f"{key}={replaced[key]}" for key in EXTRA)], tmp_path)
    assert outcome.status == 0, outcome.output
    assert "param_offload" in outcome.output
    assert "algorithm.kl_ctrl.kl_coef=0.001 does not act" in outcome.output
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    # bfloat16 on both sides.
    assert rows[-1]["parity/log_prob_abs_diff_mean"] < 0.02
