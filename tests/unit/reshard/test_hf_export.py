"""Which rank writes what of an exported model, in any layout."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import layouts, make_spec, specs

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.hf_export import INDEX, copy_model_files, plan_files, stage_of_unit, unit_of, write_index


@settings(deadline=None)
@given(specs, layouts(), st.sampled_from([1, 2000, 10**9]))
def test_every_tensor_is_in_one_file_of_bounded_size(spec, layout, max_file_bytes):
    files = plan_files(spec, layout, bytes_per_element=4, max_file_bytes=max_file_bytes)
    tensors = [tensor for file in files for tensor in file.tensors]
    assert sorted(tensors) == sorted(tensor_shapes(spec))
    assert len({file.name for file in files}) == len(files)
    assert all(file.num_bytes <= max_file_bytes or len(file.units) == 1 for file in files)
    sizes = {name: 4 * rows * (cols[0] if cols else 1) for name, (rows, *cols) in tensor_shapes(spec).items()}
    assert all(file.num_bytes == sum(sizes[tensor] for tensor in file.tensors) for file in files)


@settings(deadline=None)
@given(specs, layouts())
def test_a_stage_writes_the_layers_that_it_holds(spec, layout):
    for pp_rank in range(layout.pp):
        held = {
            layer
            for vp_stage in (range(layout.vpp) if layout.vpp else [None])
            for layer in layout.layers_of(spec.num_hidden_layers, pp_rank, vp_stage)
        }
        units = {unit_of(f"model.layers.{layer}.mlp.up_proj.weight", spec) for layer in held}
        assert {stage_of_unit(unit, spec, layout) for unit in units} == {pp_rank}
    assert stage_of_unit(unit_of("model.embed_tokens.weight", spec), spec, layout) == 0
    assert stage_of_unit(unit_of("model.norm.weight", spec), spec, layout) == layout.pp - 1


def test_replicas_share_a_stages_files():
    files = plan_files(make_spec(), ParallelLayout(world_size=2), bytes_per_element=4, max_file_bytes=10**9)
    assert [(file.dp_rank, file.units) for file in files] == [(0, (0, 1, 2)), (1, (3, 4, 5))]
    assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_the_index_names_each_tensors_file_and_one_file_needs_none(tmp_path):
    spec = make_spec(tie_word_embeddings=True)
    one = plan_files(spec, ParallelLayout(world_size=1), bytes_per_element=2, max_file_bytes=10**9)
    write_index(tmp_path, one)
    assert [file.name for file in one] == ["model.safetensors"]
    assert not (tmp_path / INDEX).exists()
    many = plan_files(spec, ParallelLayout(world_size=1), bytes_per_element=2, max_file_bytes=1)
    write_index(tmp_path, many)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == tensor_shapes(spec).keys()
    assert index["metadata"]["total_size"] == one[0].num_bytes
    assert all(before.name < after.name for before, after in pairwise(many))


def test_what_users_of_a_model_need_is_carried_and_the_dtype_is_the_trainers(tmp_path):
    model, tokenizer, folder = (tmp_path / name for name in ("model", "tokenizer", "export"))
    for path in (model, tokenizer, folder):
        path.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "dtype": "bfloat16", "hidden_size": 8}))
    (model / "generation_config.json").write_text("{}")
    (model / "tokenizer.json").write_text("the model's")
    (model / "model.safetensors").write_text("weights")
    (tokenizer / "tokenizer.json").write_text("the run's")
    copy_model_files(model, tokenizer, folder, dtype="float32")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "qwen2", "hidden_size": 8, "torch_dtype": "float32"}
    assert (folder / "tokenizer.json").read_text() == "the run's"
