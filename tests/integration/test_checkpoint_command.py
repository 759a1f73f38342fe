"""Runs that are resumed through the command: in the same layout, in another one, and after kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cli_jobs import Command, run_command

from mrl.interfaces import CheckpointError
from mrl.reshard.spec import load_spec
from mrl.trainer.damage import verify_with_tensors
from mrl.trainer.manifest import FileRecord, read_manifest
from mrl.trainer.resume import list_checkpoints

pytestmark = pytest.mark.e2e

COMMON = [
    "--config-name=demo",
    "data.train_batch_size=8",
    # Sampled validations between the steps: what they draw and cache, a resumed run has to know of.
    "trainer.test_freq=1",
    "data.val_max_samples=4",
    "actor_rollout_ref.rollout.val_kwargs.temperature=1",
    "trainer.val_before_train=False",
    "trainer.logger=[file]",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.optim.lr_decay_style=cosine",
    "actor_rollout_ref.actor.shuffle=True",
    "critic.ppo_micro_batch_size_per_gpu=2",
    "critic.optim.lr_warmup_steps=4",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.horizon=80",
    "trainer.save_freq=1",
]
ACTOR, CRITIC = "actor_rollout_ref.actor.megatron", "critic.megatron"
FOUR_RANKS = ["trainer.n_gpus_per_node=4", f"{ACTOR}.pipeline_model_parallel_size=1"]
TWO_RANKS = [
    "trainer.n_gpus_per_node=2",
    f"{ACTOR}.tensor_model_parallel_size=1",
    f"{ACTOR}.virtual_pipeline_model_parallel_size=2",
    f"{CRITIC}.tensor_model_parallel_size=2",
    f"{CRITIC}.pipeline_model_parallel_size=1",
]
STEPS = 6
# Rounding through five PPO steps of four updates each; the metrics are of size 0.1 to 10.
TOLERANCE = 2e-3


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of each step that do not measure time or memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    measured = ("time/", "memory/", "reshard/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(measured) and not k.endswith("_s")}
        for line in lines
    ]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / f"samples/train/{step}.jsonl").read_text().splitlines()
    # A prompt's uid begins with the path of its file, which each run here writes for itself.
    return [{k: v for k, v in json.loads(line).items() if k != "uid"} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `STEPS` steps that saves after each."""
    folder = tmp_path_factory.mktemp("unbroken")
    actor = "actor_rollout_ref.actor.checkpoint"
    # The critic saves synchronously, and so do the runs that are resumed.
    contents = [f"{actor}.save_contents=[model,optimizer,extra,hf_model]", f"{actor}.async_save=True"]
    own = [*FOUR_RANKS, f"trainer.total_training_steps={STEPS}", f"trainer.default_local_dir={folder / 'run'}"]
    outcome = run_command([*COMMON, *own, *contents], folder)
    assert outcome.status == 0, outcome.output
    return folder / "run"


def resume(unbroken: Path, folder: Path, layout: list[str]) -> Path:
    own = [
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder / 'run'}",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={unbroken / 'checkpoints/global_step_1'}",
    ]
    outcome = run_command([*COMMON, *layout, *own], folder)
    assert outcome.status == 0, outcome.output
    assert "resumed from step 1" in outcome.output
    return folder / "run"


def test_a_resumed_run_equals_the_unbroken_one_bitwise(unbroken, tmp_path):
    resumed = resume(unbroken, tmp_path, FOUR_RANKS)
    assert [row["step"] for row in rows(unbroken)] == list(range(1, STEPS + 1))
    assert rows(resumed) == rows(unbroken)[1:]
    for step in range(2, STEPS + 1):
        assert samples(resumed, step) == samples(unbroken, step)


def test_a_run_resumed_in_another_layout_differs_by_rounding(unbroken, tmp_path):
    resumed = resume(unbroken, tmp_path, TWO_RANKS)
    for ours, theirs in zip(rows(resumed), rows(unbroken)[1:], strict=True):
        for fraction in ("actor/clip_fraction", "critic/clip_fraction"):
            # A token at the edge of the clip range falls on either side of it.
            assert abs(ours.pop(fraction) - theirs.pop(fraction)) < 0.2
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
    for step in range(2, STEPS + 1):
        assert [s["response"] for s in samples(resumed, step)] == [s["response"] for s in samples(unbroken, step)]


def test_damage_to_any_file_of_a_checkpoint_is_noticed(unbroken, tmp_path):
    folder = tmp_path / "global_step_6"
    shutil.copytree(unbroken / "checkpoints/global_step_6", folder)
    manifest = read_manifest(folder)
    records = manifest.files
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {str(path.relative_to(folder)) for path in files} == {*records, "manifest.json"}
    named = 0
    for path in files:
        data = path.read_bytes()
        flipped = [
            data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            for at, bit in ((0, 1), (len(data) // 3, 16), (len(data) // 2, 2), (len(data) - 1, 128))
        ]
        for damaged in (*flipped, data[:-1], data + b" ", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            message = complaint_about(folder, path, records)
            # White space around a manifest is harmless.
            assert message or (path.name == "manifest.json" and read_manifest(folder) == manifest), path
            named += message is not None and message.startswith("tensor ")
        path.write_bytes(data)
    assert named > len([path for path in files if path.suffix == ".distcp"])


def complaint_about(folder: Path, path: Path, records: dict[str, FileRecord]) -> str | None:
    try:
        if path.name == "manifest.json":
            read_manifest(folder)
        else:
            verify_with_tensors(folder, records, [str(path.relative_to(folder))])
    except CheckpointError as error:
        return str(error)
    return None


def test_each_role_carries_what_other_programs_need(unbroken):
    checkpoint = unbroken / "checkpoints/global_step_6"
    for role in ("actor", "critic"):
        names = {path.name for path in (checkpoint / role / "huggingface").iterdir()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
        spec = read_manifest(checkpoint).roles[role].spec
        assert load_spec(checkpoint / role / "huggingface").to_json() == spec


def test_a_model_is_exported_with_each_checkpoint(unbroken):
    assert len(list((unbroken / "checkpoints").glob("global_step_*/actor/huggingface/*.json"))) >= STEPS
    export = unbroken / f"checkpoints/global_step_{STEPS}/actor/huggingface"
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path):
    own = [
        "trainer.max_critic_ckpt_to_keep=1",
        "critic.checkpoint.async_save=True",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    arguments = [*COMMON, *TWO_RANKS, *own]
    root = tmp_path / "run/checkpoints"
    with Command([*arguments, "trainer.total_training_steps=500"], tmp_path / "first.txt") as command:
        command.wait_for("global_step_2")
        while not list(root.glob("*.saving")):
            time.sleep(0.001)
        os.kill(command.pid, signal.SIGKILL)
        assert command.finish().status == -signal.SIGKILL
    last, _ = list_checkpoints(root)[-1]
    before = rows(tmp_path / "run")
    outcome = run_command([*arguments, f"trainer.total_training_steps={last + 1}"], tmp_path)
    assert outcome.status == 0, outcome.output
    assert f"resumed from step {last} of" in outcome.output
    after = rows(tmp_path / "run")
    assert after[-1]["step"] == last + 1
    assert [row for row in after if row["step"] <= last] == [row for row in before if row["step"] <= last]
    assert not list(root.glob("*.saving"))
    assert [path.parent.name for path in root.glob("*/critic")] == [f"global_step_{last + 1}"]

    other_model = run_command([*arguments, "critic.model.path=embedded:actor"], tmp_path)
    assert other_model.status == 1
    assert "critic tensor model.embed_tokens.weight is [16, 256] float32 there and [16, 128] float32 here" in (
        other_model.output
    ), other_model.output
    assert "Traceback" not in other_model.output
