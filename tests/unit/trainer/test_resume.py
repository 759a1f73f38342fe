"""Which checkpoint a run continues, and what becomes of files that it does not continue."""

from __future__ import annotations

import json

import pytest
from test_manifest import record

from mrl.interfaces import CheckpointError
from mrl.trainer.manifest import Manifest, write_manifest
from mrl.trainer.resume import checkpoint_folder, checkpoint_root, find_resume_point, set_aside_history

ROLES = {"actor": record(), "critic": record(is_critic=True)}


def make_checkpoint(run_dir, step, *, roles=("actor", "critic")):
    folder = checkpoint_folder(checkpoint_root(run_dir), step)
    for role in roles:
        (folder / role).mkdir(parents=True)
    write_manifest(folder, Manifest(step=step, weight_version=step, roles=ROLES, files={}))
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


def test_going_back_to_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path):
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    set_aside_history(tmp_path, find(tmp_path, "resume_path", str(first)))
    assert find(tmp_path).manifest.step == 1


def test_a_checkpoint_of_another_run_continues_none_of_this_folders_metrics(tmp_path):
    other = make_checkpoint(tmp_path / "other", 5)
    write_metrics(tmp_path, row(1))
    set_aside_history(tmp_path, find(tmp_path, "resume_path", str(other)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "other/checkpoints/global_step_5").is_dir()
