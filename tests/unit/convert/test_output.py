"""Outputs are whole or not there, whatever ends a conversion."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import contextmanager

import pytest

from mrl.convert.errors import ConvertError
from mrl.convert.hf_to_megatron import convert_to_megatron
from mrl.convert.megatron_to_hf import convert_to_hugging_face
from mrl.convert.output import output_folder
from mrl.parallel.layout import ParallelLayout


@contextmanager
def interrupting(what, num_bytes):
    """A progress bar at which somebody presses Ctrl-C when half is done."""
    done = 0

    def advance(count):
        nonlocal done
        done += count
        if done > num_bytes / 2:
            raise KeyboardInterrupt

    yield advance


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupt_leaves_nothing(models, converted, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(models["qwen2"], kept)
    layout = ParallelLayout(world_size=1)
    with pytest.raises(KeyboardInterrupt):
        convert_to_megatron(models["qwen2"], tmp_path / "new", layout, dtype=None, overwrite=False, track=interrupting)
    with pytest.raises(KeyboardInterrupt):
        convert_to_hugging_face(converted, kept, hf=None, dtype=None, overwrite=True, track=interrupting)
    assert contents(tmp_path) == ["kept"]
    assert contents(kept) == contents(models["qwen2"])


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(models, converted, convert, tmp_path, capsys, limit):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses longer files, as it refuses any on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        statuses = [
            convert("hf2megatron", "--hf", models["qwen2"], "--out", tmp_path / "out"),
            convert("megatron2hf", "--checkpoint", converted, "--out", tmp_path / "out"),
            convert("reshard", "--checkpoint", converted, "--out", tmp_path / "out"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert statuses == [2, 2, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("File too large" in line for line in lines)
    assert contents(tmp_path) == []


def test_what_is_there_is_replaced_only_when_asked(models, convert, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    command = ["hf2megatron", "--hf", models["qwen2"], "--out", out]
    assert convert(*command) == 2
    assert "out exists and is not empty; choose another --out or add --overwrite" in capsys.readouterr().err
    assert contents(out) == ["mine"]
    assert convert(*command, "--overwrite") == 0
    assert contents(out) == ["dist_ckpt", "huggingface", "manifest.json"]
    assert contents(tmp_path) == ["out"]


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with (
        pytest.raises(ConvertError, match=r"needs .* GiB, but .* has .* GiB free"),
        output_folder(tmp_path / "out", num_bytes=10**18, overwrite=False),
    ):
        pytest.fail("the block was entered")
    assert contents(tmp_path) == []


def test_what_a_killed_conversion_left_is_undone_and_a_running_ones_is_not(tmp_path):
    child = os.fork()
    if child == 0:
        with output_folder(tmp_path / "out", num_bytes=0, overwrite=False) as folder:
            (folder / "part").write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    assert contents(tmp_path) == [f".out.converting-{child}"]
    # Killed between two renames, a conversion has moved what it was to replace.
    (tmp_path / f".out.replaced-{child}").mkdir()
    (tmp_path / f".out.replaced-{child}/old").write_text("old")
    with (
        pytest.raises(ConvertError, match="not empty"),
        output_folder(tmp_path / "out", num_bytes=0, overwrite=False),
    ):
        pytest.fail("the block was entered")
    assert contents(tmp_path / "out") == ["old"]
    running = tmp_path / f".out.converting-{os.getppid()}"
    running.mkdir()
    with output_folder(tmp_path / "out", num_bytes=0, overwrite=True) as folder:
        (folder / "all").write_text("whole")
        assert contents(tmp_path / "out") == ["old"]
    assert contents(tmp_path) == [running.name, "out"]
    assert contents(tmp_path / "out") == ["all"]
