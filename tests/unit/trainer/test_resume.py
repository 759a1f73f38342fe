"""Which checkpoint a run continues, and what becomes of files that it does not continue."""

from __future__ import annotations

import json
import time

import pytest
from test_manifest import record

from mrl.interfaces import CheckpointError
from mrl.trainer.manifest import Manifest, list_files, record_files, write_manifest
from mrl.trainer.resume import (
    CurrentRole,
    checkpoint_folder,
    checkpoint_root,
    find_resume_point,
    set_aside_history,
)

RECORDS = {"actor": record(), "critic": record(is_critic=True)}
ROLES = {name: CurrentRole(record=current, model_files={}) for name, current in RECORDS.items()}


def make_checkpoint(run_dir, step, *, roles=("actor", "critic"), records=RECORDS):
    folder = checkpoint_folder(checkpoint_root(run_dir), step)
    for role in roles:
        (folder / role).mkdir(parents=True)
    (folder / "actor/huggingface").mkdir(parents=True)
    (folder / "actor/huggingface/tokenizer.json").write_text("words")
    files = record_files(folder, list_files(folder))
    write_manifest(folder, Manifest(step=step, weight_version=step, roles=records, files=files))
    return folder


def find(run_dir, mode="auto", path=None):
    return find_resume_point(mode, run_dir, path, ROLES)


def write_metrics(run_dir, *lines):
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def row(step):
    return json.dumps({"step": step, "reward/mean": step / 7}) + "\n"


def test_the_newest_complete_checkpoint_is_continued(tmp_path):
    assert find(tmp_path) is None
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    root = checkpoint_root(tmp_path)
    (root / "global_step_11").mkdir()
    (root / "global_step_12.saving").mkdir()
    point = find(tmp_path)
    assert point.manifest.step == 10
    assert point.folder == root / "global_step_10"


def test_checkpoints_that_lost_a_role_are_passed_over_unless_named(tmp_path):
    make_checkpoint(tmp_path, 1)
    lost = make_checkpoint(tmp_path, 2, roles=("actor",))
    assert find(tmp_path).manifest.step == 1
    with pytest.raises(CheckpointError, match=r"no longer has its critic.*max_critic_ckpt_to_keep"):
        find(tmp_path, "resume_path", str(lost))


def test_a_run_with_a_critic_does_not_continue_one_without_nor_pass_it_over(tmp_path):
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2, roles=("actor",), records={"actor": record()})
    with pytest.raises(CheckpointError, match=r"global_step_2 was written by a run without critic"):
        find(tmp_path)


def test_a_run_without_a_critic_continues_any(tmp_path):
    actor_only = {"actor": ROLES["actor"]}
    make_checkpoint(tmp_path, 1)
    assert find_resume_point("auto", tmp_path, None, actor_only).manifest.step == 1
    make_checkpoint(tmp_path, 2, roles=("actor",), records={"actor": record()})
    assert find_resume_point("auto", tmp_path, None, actor_only).manifest.step == 2


@pytest.mark.parametrize("contents", ["words", "worde", "other words"])
def test_another_tokenizer_is_said(tmp_path, caplog, contents):
    make_checkpoint(tmp_path / "run", 1)
    (tmp_path / "tokenizer.json").write_text(contents)
    current = CurrentRole(record=record(), model_files={"tokenizer.json": tmp_path / "tokenizer.json"})
    assert find_resume_point("auto", tmp_path / "run", None, {"actor": current}).manifest.step == 1
    assert ("the actor's tokenizer.json differ" in caplog.text) == (contents != "words")


def test_a_mode_can_disable_or_name_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    assert find(tmp_path, "disable") is None
    assert find(tmp_path, "resume_path", str(checkpoint_folder(checkpoint_root(tmp_path), 1))).manifest.step == 1
    with pytest.raises(CheckpointError, match="/nowhere is not a complete checkpoint"):
        find(tmp_path, "resume_path", "/nowhere")


def test_a_resumed_runs_metrics_go_on_in_the_same_file(tmp_path):
    make_checkpoint(tmp_path, 2)
    write_metrics(tmp_path, row(0), row(1), row(2))
    set_aside_history(tmp_path, find(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == row(0) + row(1) + row(2)
    assert list(tmp_path.glob("metrics.until-*")) == []


def test_rows_after_the_checkpoint_are_cut_and_the_whole_file_is_kept(tmp_path):
    make_checkpoint(tmp_path, 2)
    whole = row(1) + row(2) + row(3) + '{"step": 4, "rew'
    write_metrics(tmp_path, whole)
    set_aside_history(tmp_path, find(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == row(1) + row(2)
    (kept,) = tmp_path.glob("metrics.until-*")
    assert kept.read_text() == whole


def test_a_new_run_moves_the_old_ones_metrics_and_checkpoints_aside(tmp_path):
    make_checkpoint(tmp_path, 2)
    write_metrics(tmp_path, row(1))
    set_aside_history(tmp_path, None)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert find(tmp_path) is None
    (aside,) = tmp_path.glob("checkpoints.until-*")
    assert (aside / "global_step_2/manifest.json").is_file()


def test_what_runs_of_the_same_second_set_aside_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "until-now")
    for step in (1, 2, 3):
        write_metrics(tmp_path, row(step))
        set_aside_history(tmp_path, None)
    kept = {path.read_text() for path in tmp_path.glob("metrics.until-*")}
    assert kept == {row(1), row(2), row(3)}


def test_going_back_to_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path):
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    latest = checkpoint_root(tmp_path) / "latest"
    latest.write_text("global_step_2\n")
    set_aside_history(tmp_path, find(tmp_path, "resume_path", str(first)))
    assert find(tmp_path).manifest.step == 1
    assert latest.read_text() == "global_step_1\n"
    set_aside_history(tmp_path, None)
    assert not latest.exists()


def test_a_checkpoint_of_another_run_continues_none_of_this_folders_metrics(tmp_path):
    other = make_checkpoint(tmp_path / "other", 5)
    write_metrics(tmp_path, row(1))
    set_aside_history(tmp_path, find(tmp_path, "resume_path", str(other)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "other/checkpoints/global_step_5").is_dir()
