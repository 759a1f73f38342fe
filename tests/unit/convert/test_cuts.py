"""The boxes of a layout's ranks against cat and chunk."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import make_spec, moe_specs, padded, specs

from mrl.convert.cuts import boxes_of_ranks, stage_of, whole_pieces
from mrl.convert.names import Parameter, model_parameters, stored_parameters
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.reference import megatron_shard
from mrl.reshard.synthetic import distinct_state

PLAIN = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def shard_of(spec, tp_rank, tp_size, rows):
    state = distinct_state(spec, torch.float32)
    layers = range(spec.num_hidden_layers)
    return megatron_shard(
        state,
        spec,
        tp_rank=tp_rank,
        tp_size=tp_size,
        layers=layers,
        pre_process=True,
        post_process=True,
        padded_vocab_size=rows,
        experts=range(spec.moe.num_experts) if spec.moe else (),
    )


def plain_name(name):
    for fused, plain in PLAIN.items():
        name = name.replace(fused, plain)
    return name


@settings(max_examples=25, deadline=None)
@given(spec=st.one_of(specs, moe_specs), tp_size=st.sampled_from([1, 2, 4]))
def test_ranks_boxes_are_their_shards_and_together_the_parameter(spec, tp_size):
    whole = shard_of(spec, 0, 1, spec.vocab_size)
    shards = [shard_of(spec, rank, tp_size, padded(spec.vocab_size, tp_size)) for rank in range(tp_size)]
    for parameter in model_parameters(spec):
        name = plain_name(parameter.name)
        matrix = whole[name].view(whole[name].shape[0], -1)
        covered = torch.zeros(matrix.shape, dtype=torch.int)
        for rank, boxes in enumerate(boxes_of_ranks(spec, parameter, tp_size)):
            parts = [matrix[box.row : box.row + box.rows, box.col : box.col + box.cols] for box in boxes]
            for box in boxes:
                covered[box.row : box.row + box.rows, box.col : box.col + box.cols] += 1
            if parts:
                local = shards[rank][name].view(shards[rank][name].shape[0], -1)
                cut = torch.cat(parts)
                # Bit patterns: some of the distinct values are NaN.
                assert torch.equal(cut.view(torch.int32), local[: len(cut)].view(torch.int32)), (name, rank)
        assert bool((covered == 1).all()), name


def test_parameters_are_on_their_pipeline_stage():
    spec = make_spec(num_hidden_layers=4)
    layout = ParallelLayout(world_size=4, tp=2, pp=2)
    stages = {p.name: stage_of(spec, whole_pieces(spec, p), layout) for p in model_parameters(spec)}
    assert stages["embedding.word_embeddings.weight"] == stages["decoder.layers.1.mlp.linear_fc1.weight"] == 0
    assert stages["output_layer.weight"] == stages["decoder.layers.2.mlp.linear_fc1.weight"] == 1


@settings(deadline=None)
@given(st.one_of(specs, moe_specs))
def test_a_stored_tensor_gives_the_parameters_that_it_was_made_of(spec):
    parameters = model_parameters(spec)
    shapes = {p.place.key: (*p.place.counts, *p.shape) for p in parameters}
    found = {p.name: p for key, shape in shapes.items() for p in stored_parameters(key, shape)}
    assert found == {p.name: p for p in parameters}


def test_keys_with_a_layers_number_are_read_as_they_are():
    [parameter] = stored_parameters("decoder.layers.3.mlp.linear_fc2.weight", (8, 16))
    assert (parameter.name, parameter.shape) == ("decoder.layers.3.mlp.linear_fc2.weight", (8, 16))
    assert isinstance(parameter, Parameter)
    assert (parameter.place.key, parameter.place.lead) == ("decoder.layers.3.mlp.linear_fc2.weight", ())
