"""The slow reference itself: HF to Megatron and back, and values that show a wrong place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import bitwise_equal, layouts, make_spec, moe_specs, specs, state_and_trainer

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.reference import hugging_face_state, megatron_shard
from mrl.reshard.synthetic import distinct_state


@settings(max_examples=20, deadline=None)
@given(spec=specs, layout=layouts(), multiple=st.sampled_from([1, 8]))
def test_shards_of_any_layout_give_the_checkpoint_back(spec, layout, multiple):
    state, trainer = state_and_trainer(spec, layout, vocab_multiple=multiple)
    stages = [[None] * layout.tp for _ in range(layout.pp)]
    for rank, shard in enumerate(trainer.memory):
        tp_rank, _, _, pp_rank = layout.coordinates(rank)
        stages[pp_rank][tp_rank] = shard
    back = hugging_face_state(stages, spec)
    assert back.keys() == state.keys()
    assert all(bitwise_equal(back[name], state[name]) for name in state)


@settings(max_examples=10, deadline=None)
@given(spec=moe_specs, tp=st.sampled_from([1, 2, 4]), data=st.data())
def test_shards_of_experts_give_the_checkpoint_back(spec, tp, data):
    ep = data.draw(st.sampled_from([size for size in (1, 2, 4) if tp % size == 0]))
    etp = data.draw(st.sampled_from([size for size in (1, 2, 4) if tp // ep % size == 0]))
    layout = ParallelLayout(world_size=2 * tp, tp=tp, pp=2, ep=ep, etp=etp)
    state, trainer = state_and_trainer(spec, layout)
    back = hugging_face_state([trainer.memory[:tp], trainer.memory[tp:]], spec, etp_size=etp)
    assert back.keys() == state.keys()
    assert all(bitwise_equal(back[name], state[name]) for name in state)


def test_a_hand_worked_shard():
    # 2 groups of one q head, dim 1: rows of linear_qkv are q0 k0 v0 q1 k1 v1, and rank 1 of 2 has the second group.
    sizes = dict(hidden_size=1, intermediate_size=4, num_attention_heads=2, num_key_value_heads=2, head_dim=1)
    spec = make_spec(vocab_size=3, num_hidden_layers=1, attention_bias=False, **sizes)
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    prefix = "model.layers.0."
    for number, name in enumerate("qkv"):
        state[f"{prefix}self_attn.{name}_proj.weight"] = torch.tensor([[10.0 * number], [10.0 * number + 1]])
    state[prefix + "mlp.gate_proj.weight"] = torch.tensor([[1.0], [2], [3], [4]])
    state[prefix + "mlp.up_proj.weight"] = torch.tensor([[5.0], [6], [7], [8]])
    state["model.embed_tokens.weight"] = torch.tensor([[1.0], [2], [3]])
    shard = megatron_shard(
        state, spec, tp_rank=1, tp_size=2, layers=[0], pre_process=True, post_process=False, padded_vocab_size=4
    )
    assert shard["decoder.layers.0.self_attention.linear_qkv.weight"].flatten().tolist() == [1, 11, 21]
    assert shard["decoder.layers.0.mlp.linear_fc1.weight"].flatten().tolist() == [3, 4, 7, 8]
    assert shard["embedding.word_embeddings.weight"].flatten().tolist() == [3, 0]
    assert "output_layer.weight" not in shard


def test_a_tied_output_layer_is_held_by_a_last_stage_without_the_embedding_only():
    spec = make_spec(tie_word_embeddings=True)
    _, two_stages = state_and_trainer(spec, ParallelLayout(world_size=2, pp=2))
    _, one_stage = state_and_trainer(spec, ParallelLayout(world_size=1))
    assert [("output_layer.weight" in shard) for shard in two_stages.memory + one_stage.memory] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_of_the_synthetic_checkpoint_repeats(dtype):
    spec = make_spec(hidden_size=8)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    rows = [
        tuple(row)
        for tensor in distinct_state(spec, dtype).values()
        if tensor.dim() == 2
        for row in tensor.view(width).tolist()
    ]
    assert len(set(rows)) == len(rows)
