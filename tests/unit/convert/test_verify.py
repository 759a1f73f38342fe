"""Damage to any file is found, or harmless; what is found is named."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrl.convert.dist_checkpoint import DistCheckpoint
from mrl.reshard.hf_export import INDEX


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def checkpoint(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "checkpoint")


@pytest.fixture
def exported(converted, convert, tmp_path):
    assert convert("megatron2hf", "--checkpoint", converted, "--out", tmp_path / "exported") == 0
    return tmp_path / "exported"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_byte_flipped_anywhere_in_a_checkpoint_is_found(checkpoint, convert, capsys):
    choose = random.Random(0)
    for path in files_of(checkpoint):
        before = path.read_bytes()
        for at in (0, choose.randrange(len(before)), len(before) - 1):
            flip(path, at)
            assert convert("verify", checkpoint) != 0, (path, at)
            assert str(path) in capsys.readouterr().err
            path.write_bytes(before)
    assert convert("verify", checkpoint) == 0


def test_the_tensor_in_the_damaged_file_is_named(checkpoint, convert, capsys):
    with DistCheckpoint(checkpoint / "dist_ckpt") as stored:
        [shard] = [s for s in stored.shards if s.key.endswith("linear_proj.weight") and s.offsets[0] == 3][1:]
    flip(checkpoint / "dist_ckpt" / shard.file, shard.offset + shard.length // 2)
    assert convert("verify", checkpoint) == 1
    error = capsys.readouterr().err
    assert f"tensor decoder.layers.self_attention.linear_proj.weight (part at {list(shard.offsets)})" in error
    assert shard.file in error


@pytest.mark.parametrize("harm", ["missing", "short", "empty"])
def test_a_file_that_is_not_whole_is_named_in_one_line(checkpoint, exported, convert, capsys, harm):
    for folder in (checkpoint, exported):
        for path in files_of(folder):
            before = path.read_bytes()
            path.unlink()
            if harm != "missing":
                path.write_bytes(before[: -len(before) // 3] if harm == "short" else b"")
            status = convert("verify", folder)
            error = capsys.readouterr().err
            path.write_bytes(before)
            if status == 0:
                # Without its list of checksums the rest of a folder is still checked.
                assert (harm, path.name) in (("missing", "manifest.json"), ("missing", "SHA256SUMS")), path
            else:
                assert len(error.splitlines()) == 1, error
                assert path.parent.name in error, (path, error)


def test_a_byte_flipped_anywhere_in_an_exported_model_is_found(exported, convert):
    for path in files_of(exported):
        size = path.stat().st_size
        for at in (0, size // 3, size // 2, size - 1):
            flip(path, at)
            assert convert("verify", exported) == 1, (path, at)
            flip(path, at)
    assert convert("verify", exported) == 0


def test_values_that_are_not_finite_are_found_in_their_tensor(models, convert, tmp_path, capsys):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.inf
    save_file(state, folder / "model.safetensors")
    assert convert("verify", folder) == 1
    assert "tensor model.layers.1.mlp.up_proj.weight has a value that is not finite in row 5" in capsys.readouterr().err


def test_weights_that_do_not_fit_their_description_are_named(models, convert, tmp_path, capsys):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    save_file({**state, name: state[name][:-1].contiguous()}, folder / "model.safetensors")
    assert convert("verify", folder) == 1
    assert f"tensor {name} has shape" in capsys.readouterr().err
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors")
    assert convert("verify", folder) == 1
    assert f"tensor {name} is missing" in capsys.readouterr().err


def test_an_index_has_to_name_every_file_and_only_tensors_that_exist(models, convert, tmp_path, capsys):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert convert("verify", folder) == 0
    (folder / INDEX).write_text(json.dumps({"weight_map": {**names, "more": "one.safetensors"}}))
    assert convert("verify", folder) == 1
    assert "tensor more is not in the file" in capsys.readouterr().err
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    save_file({"stray": torch.zeros(1)}, folder / "two.safetensors")
    assert convert("verify", folder) == 1
    assert "two.safetensors is not in" in capsys.readouterr().err


def test_a_pickle_in_the_place_of_a_tensor_runs_no_code(checkpoint, convert, capsys):
    class Harm:
        def __reduce__(self):
            return (open, (str(checkpoint / "harm"), "w"))

    with DistCheckpoint(checkpoint / "dist_ckpt") as stored:
        shard = stored.tensors["decoder.final_layernorm.weight"].shards[0]
    torch.save(Harm(), checkpoint / "harmful")
    data = (checkpoint / "harmful").read_bytes()
    path = checkpoint / "dist_ckpt" / shard.file
    content = bytearray(path.read_bytes())
    content[shard.offset : shard.offset + len(data)] = data
    path.write_bytes(content)
    (checkpoint / "manifest.json").unlink()
    assert convert("verify", checkpoint) == 1
    assert "decoder.final_layernorm.weight" in capsys.readouterr().err
    assert not (checkpoint / "harm").exists()
