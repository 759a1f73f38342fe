"""Differences worked by hand, in any mix of folders and checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrl.convert.diff import diff_weights
from mrl.convert.progress import no_progress


def folder(path, **tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def compare(left, right):
    results = diff_weights(left, right, role=None, hf=None, optimizer=False, track=no_progress)
    return {result.name: result for result in results}


def test_numbers_are_those_worked_by_hand(tmp_path):
    left = folder(
        tmp_path / "left",
        same=torch.tensor([1.0, -0.0]),
        sign=torch.tensor([0.0]),
        moved=torch.tensor([[1.0, 2.0], [3.0, 4.5]]),
        narrow=torch.tensor([1.0, 256.0]).bfloat16(),
        bad=torch.tensor([math.nan, 1.0]),
        shape=torch.zeros(2, 3),
        left=torch.zeros(1),
        whole=torch.tensor([2, 2**60]),
    )
    right = folder(
        tmp_path / "right",
        same=torch.tensor([1.0, -0.0]),
        sign=torch.tensor([-0.0]),
        moved=torch.tensor([[1.0, 2.5], [3.0, 4.0]]),
        narrow=torch.tensor([1.0, 256.0]),
        bad=torch.tensor([0.0, 1.0]),
        shape=torch.zeros(3, 2),
        right=torch.zeros(1),
        whole=torch.tensor([2, 2**60]),
    )
    results = compare(left, right)
    assert {name for name, result in results.items() if result.is_bitwise_equal} == {"same", "whole"}
    assert (results["moved"].max_abs, results["moved"].relative) == (0.5, 0.125)
    assert (results["sign"].max_abs, results["sign"].relative) == (0.0, 0.0)
    assert {name for name, result in results.items() if result.is_equal(0.0)} == {"same", "sign", "narrow", "whole"}
    assert {name for name, result in results.items() if result.is_equal(0.5)} == {
        *("same", "sign", "narrow", "whole", "moved")
    }
    assert math.isnan(results["bad"].max_abs)
    assert results["left"].right is None
    assert results["right"].left is None


def test_status_and_table_of_what_differs(models, converted, convert, tmp_path, capsys):
    assert convert("diff", models["qwen2"], converted) == 0
    state = load_file(models["qwen2"] / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"
    expected = 1.5 - float(state[name][3, 4])
    state[name][3, 4] = 1.5
    changed = folder(tmp_path / "changed", **state)
    capsys.readouterr()
    assert convert("diff", changed, converted, "--only-different") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "model." in line]
    assert len(lines) == 1
    assert name in lines[0]
    assert f"{expected:.3e}" in lines[0]
    assert convert("diff", changed, converted, "--atol", 1.01 * expected) == 0


def test_a_tied_head_that_was_stored_twice_is_no_difference(models, convert, tmp_path):
    state = load_file(models["qwen2"] / "model.safetensors")
    twice = folder(tmp_path / "twice", **state, **{"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    (twice / "config.json").write_text((models["qwen2"] / "config.json").read_text())
    assert convert("diff", twice, models["qwen2"]) == 0


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_what_is_no_model_is_refused(models, convert, tmp_path, capsys, path):
    (tmp_path / "empty").mkdir()
    assert convert("diff", models["qwen2"], tmp_path / path) == 2
    assert str(tmp_path / path) in capsys.readouterr().err
