"""Requests that cannot be done are one line and exit status 2."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported"),
        ({"num_hidden_layers": 5}, "tensor model.layers.4"),
        ({"hidden_size": 32}, r"has shape"),
    ],
)
def test_a_model_that_cannot_be_converted_is_named(models, convert, tmp_path, capsys, changes, message):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(models["llama"] / "model.safetensors")
    config = json.loads((models["llama"] / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    assert convert("hf2megatron", "--hf", model, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_layout_that_does_not_fit_is_refused(models, convert, tmp_path, capsys):
    assert convert("hf2megatron", "--hf", models["llama"], "--out", tmp_path / "out", "--tp", 3) == 2
    assert "tensor_model_parallel_size = 3" in capsys.readouterr().err
    assert convert("hf2megatron", "--hf", models["llama"], "--out", tmp_path / "out", "--pp", 3) == 2
    assert "pipeline_model_parallel_size = 3" in capsys.readouterr().err


def test_a_configuration_of_another_model_is_refused(models, converted, convert, tmp_path, capsys):
    assert convert("megatron2hf", "--checkpoint", converted, "--hf", models["qwen3"], "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "is of another model than" in error
    assert "family is qwen3" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["megatron2hf", "--checkpoint", "{model}", "--out", "{out}"],
        ["reshard", "--checkpoint", "{model}", "--out", "{out}"],
        ["diff", "{model}", "{checkpoint}", "--optimizer"],
        ["verify", "{out}"],
        ["hf2megatron", "--hf", "{checkpoint}", "--out", "{out}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_of_the_wrong_kind_is_refused(models, converted, convert, tmp_path, capsys, arguments):
    places = {"model": models["llama"], "checkpoint": converted, "out": tmp_path / "out"}
    assert convert(*(text.format(**places) for text in arguments)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
