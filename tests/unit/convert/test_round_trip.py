"""Every family through a checkpoint of several layouts and back, bitwise."""

from __future__ import annotations

import json

import pytest
import torch
from family_configs import FAMILY_CONFIGS
from safetensors.torch import load_file

from mrl.convert.megatron_to_hf import convert_to_hugging_face
from mrl.convert.progress import no_progress
from mrl.reshard.hf_export import INDEX

LAYOUTS = [(1, 1), (2, 2)]


def load(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(folder, model):
    ours, theirs = load(folder), load(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_model_comes_back_bitwise(models, convert, tmp_path, family, layout):
    tp, pp = layout
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    assert convert("hf2megatron", "--hf", models[family], "--out", checkpoint, "--tp", tp, "--pp", pp) == 0
    assert len(list((checkpoint / "dist_ckpt").glob("*.distcp"))) == tp * pp
    assert convert("megatron2hf", "--checkpoint", checkpoint, "--out", back) == 0
    assert_same(back, models[family])


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_resharded_checkpoint_holds_the_same(models, convert, tmp_path, family):
    first, second, back = tmp_path / "first", tmp_path / "second", tmp_path / "back"
    assert convert("hf2megatron", "--hf", models[family], "--out", first, "--tp", 4) == 0
    assert convert("reshard", "--checkpoint", first, "--out", second, "--tp", 2, "--pp", 2) == 0
    assert convert("diff", first, second) == 0
    assert convert("verify", second) == 0
    assert convert("megatron2hf", "--checkpoint", second, "--out", back) == 0
    assert_same(back, models[family])


def test_what_users_of_a_model_need_is_carried_along(models, converted, convert, tmp_path):
    assert convert("megatron2hf", "--checkpoint", converted, "--out", tmp_path / "back") == 0
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_text() == (models["qwen2"] / name).read_text()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == {**FAMILY_CONFIGS["qwen2"], "torch_dtype": "bfloat16"}


def test_large_models_are_several_files_with_an_index(models, converted, tmp_path):
    out = tmp_path / "back"
    convert_to_hugging_face(
        converted, out, hf=None, dtype=None, overwrite=False, track=no_progress, max_file_bytes=100_000
    )
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert all(name in load_file(out / file) for name, file in weight_map.items())
    assert_same(out, models["qwen2"])


def test_another_type_can_be_asked_for(models, converted, convert, tmp_path):
    assert convert("megatron2hf", "--checkpoint", converted, "--out", tmp_path / "wide", "--dtype", "float32") == 0
    wide, narrow = load(tmp_path / "wide"), load(models["qwen2"])
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in narrow.items())
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"
    narrowed = tmp_path / "narrow"
    assert convert("hf2megatron", "--hf", tmp_path / "wide", "--out", narrowed, "--dtype", "bfloat16") == 0
    assert convert("diff", narrowed, models["qwen2"]) == 0
