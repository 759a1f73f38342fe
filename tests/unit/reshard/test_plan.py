"""Plans: every byte once, replicas chosen near and evenly, equal for equal inputs, clear refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import engine_params, export, layouts, make_spec, plan_for, specs, state_and_trainer

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import sglang_pieces
from mrl.reshard.layout import SourceRank, TargetParam, targets_of
from mrl.reshard.operations import CopyOp, coalesce
from mrl.reshard.plan import build_plan
from mrl.reshard.spec import ModelSpec
from mrl.reshard.synthetic import distinct_state

SPEC = make_spec()
EMBEDDING = "model.embed_tokens.weight"


def case(layout, *, spec=SPEC, tp_size=1, tp_rank=0, **kwargs):
    state, trainer = state_and_trainer(spec, layout, **kwargs)
    return trainer.sources, engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size)


@settings(max_examples=15, deadline=None)
@given(spec=specs, layout=layouts(), tp_size=st.sampled_from([1, 2, 4, 8]))
def test_bytes_copied_and_filled_are_the_engine_ranks_bytes(spec, layout, tp_size):
    state, trainer = state_and_trainer(spec, layout)
    for tp_rank in range(tp_size):
        params = engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size)
        plan = plan_for(spec, trainer.sources, params, tp_rank=tp_rank, tp_size=tp_size)
        assert plan.stats.bytes + plan.stats.fill_bytes == sum(param.nbytes for param in params.values())
        assert sum(plan.stats.bytes_by_source.values()) == plan.stats.bytes == sum(op.num_bytes for op in plan.copies)


def test_equal_layouts_copy_each_parameter_in_one_run():
    # One query group per rank: Megatron's and SGLang's qkv rows agree, so every parameter is one contiguous copy.
    spec = make_spec(num_key_value_heads=2, vocab_size=64)
    sources, params = case(ParallelLayout(world_size=2, tp=2), spec=spec, tp_size=2, tp_rank=1)
    plan = plan_for(spec, sources, params, tp_rank=1, tp_size=2)
    assert len(plan.copies) == len(params)
    assert all(op.rows == 1 for op in plan.copies)
    assert not plan.fills


def test_column_cuts_stay_strided():
    sources, params = case(ParallelLayout(world_size=2, tp=2))
    ops = [op for op in plan_for(SPEC, sources, params).copies if op.dst_param == "model.layers.0.mlp.down_proj.weight"]
    # [8, 16] float32 from two ranks' [8, 8]: 8 rows of 32 bytes, the second box 32 bytes further right.
    assert [(op.src_rank, op.dst_offset, op.rows, op.row_bytes, op.src_pitch, op.dst_pitch) for op in ops] == [
        (0, 0, 8, 32, 32, 64),
        (1, 32, 8, 32, 32, 64),
    ]


def test_vocabulary_rows_past_the_model_are_filled_on_the_ranks_that_hold_them():
    # 50 rows padded to 64 at TP4: rank 2 holds 32 to 47, rank 3 holds 48 to 63 of which 14 are padding.
    sources, _ = case(ParallelLayout(world_size=1))
    fills = []
    for rank in range(4):
        shape = (16, 8)
        targets = [TargetParam(name=EMBEDDING, shape=shape, dtype="float32", element_size=4)]
        plan = build_plan(SPEC, sources, targets, tp_rank=rank, tp_size=4, host="host", device=-1)
        fills.append([(fill.dst_offset, fill.num_bytes) for fill in plan.fills])
    assert fills == [[], [], [], [(2 * 32, 14 * 32)]]


def test_a_replica_on_the_same_device_is_read_before_one_on_the_same_host_or_elsewhere():
    layout = ParallelLayout(world_size=3)
    sources, params = case(layout, first_device=0)
    assert plan_for(SPEC, sources, params, device=2).stats.bytes_by_source.keys() == {2}
    assert plan_for(SPEC, sources, params, device=2).stats.local_bytes == sum(
        count for count in plan_for(SPEC, sources, params, device=2).stats.bytes_by_source.values()
    )
    away = [replace(source, host="other") for source in sources[:2]] + sources[2:]
    assert plan_for(SPEC, away, params, device=7).stats.bytes_by_source.keys() == {2}
    assert plan_for(SPEC, away, params, device=7).stats.local_bytes == 0


def test_equally_near_replicas_share_the_load():
    sources, params = case(ParallelLayout(world_size=4))
    loads = plan_for(SPEC, sources, params).stats.bytes_by_source
    largest = max(param.nbytes for param in params.values())
    assert len(loads) == 4
    assert max(loads.values()) - min(loads.values()) <= largest


def test_tied_copies_on_the_first_and_last_stage_are_replicas():
    spec = make_spec(tie_word_embeddings=True)
    sources, params = case(ParallelLayout(world_size=4, tp=2, pp=2), spec=spec)
    assert {param.name for param in sources[-1].params} >= {"output_layer.weight"}
    plan = plan_for(spec, sources, params)
    assert sum(op.num_bytes for op in plan.copies if op.dst_param == EMBEDDING) == 50 * 8 * 4


def test_equal_inputs_give_equal_digests_also_after_json():
    sources, params = case(ParallelLayout(world_size=8, tp=2, pp=2))
    plan = plan_for(SPEC, sources, params)
    again = [SourceRank.from_json(source.to_json()) for source in sources]
    spec = ModelSpec.from_json(SPEC.to_json())
    assert plan_for(spec, again, params).digest == plan.digest
    assert plan_for(SPEC, sources[:4] + sources[6:], params).digest != plan.digest


def test_a_missing_pipeline_stage_is_named_by_its_first_parameter():
    sources, params = case(ParallelLayout(world_size=2, pp=2))
    with pytest.raises(ValueError, match=r"parameter model\.norm\.weight: .* written by no source rank"):
        plan_for(SPEC, sources[:1], params)


def test_a_missing_tensor_parallel_rank_is_named_by_its_rows():
    sources, params = case(ParallelLayout(world_size=2, tp=2))
    with pytest.raises(ValueError, match=r"rows \[25, 50\) are written by no source rank"):
        plan_for(SPEC, sources[:1], {EMBEDDING: params[EMBEDDING]})


def test_sources_of_two_layouts_are_refused():
    state = distinct_state(SPEC, torch.float32)
    whole = export(SPEC, state, ParallelLayout(world_size=1)).sources
    halves = export(SPEC, state, ParallelLayout(world_size=2, tp=2)).sources
    mixed = whole + [replace(source, rank=source.rank + 1) for source in halves]
    params = engine_params(SPEC, state, tp_rank=0, tp_size=1)
    with pytest.raises(ValueError, match="written more than once"):
        plan_for(SPEC, mixed, params)


def test_a_live_parameter_of_another_shape_is_refused():
    sources, params = case(ParallelLayout(world_size=1))
    params["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(24, 8)
    with pytest.raises(ValueError, match=r"qkv_proj.weight has shape \(24, 8\)"):
        plan_for(SPEC, sources, params)


def test_another_dtype_is_refused_with_both_named():
    sources, params = case(ParallelLayout(world_size=1), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="is float32, but trainer rank 0 exports bfloat16"):
        plan_for(SPEC, sources, {name: param.float() for name, param in params.items()})


def test_a_source_parameter_outside_its_buffer_is_refused():
    sources, params = case(ParallelLayout(world_size=1))
    last = replace(sources[0].params[-1], offset_bytes=sources[0].buffers[0].num_bytes - 4)
    with pytest.raises(ValueError, match=r"output_layer.weight at byte .* leaves buffer 0"):
        plan_for(SPEC, [replace(sources[0], params=(*sources[0].params[:-1], last))], params)


def test_repeated_or_absent_inputs_are_refused():
    sources, params = case(ParallelLayout(world_size=1))
    with pytest.raises(ValueError, match="source rank 0 is listed more than once"):
        plan_for(SPEC, sources * 2, params)
    with pytest.raises(ValueError, match="0 source ranks"):
        plan_for(SPEC, [], params)


def test_a_manifest_lists_only_what_can_be_resharded():
    assert targets_of([("w", torch.zeros(2, 3, dtype=torch.bfloat16))]) == [
        TargetParam(name="w", shape=(2, 3), dtype="bfloat16", element_size=2)
    ]
    with pytest.raises(ValueError, match="must be contiguous"):
        targets_of([("w", torch.zeros(2, 3).t())])
    assert targets_of([("w", torch.zeros(2, 3, 4))])[0].rows == 6
    with pytest.raises(ValueError, match="1 to 3 dimensions"):
        targets_of([("w", torch.zeros(2, 3, 4, 5))])


def test_neighbouring_rows_are_joined_only_where_both_sides_continue():
    def op(src, dst, rows=1, pitch=8):
        return CopyOp(0, 0, src, pitch, "w", dst, pitch, rows, 8)

    flat = CopyOp(0, 0, 0, 24, "w", 0, 24, 1, 24)
    assert list(coalesce([op(0, 0), op(8, 8, rows=2)])) == [flat]
    assert list(coalesce([op(0, 0), op(16, 8)])) == [op(0, 0), op(16, 8)]
    strided = [op(0, 0, rows=2, pitch=32), op(64, 64, rows=3, pitch=32)]
    assert list(coalesce(strided)) == [op(0, 0, rows=5, pitch=32)]
    other = replace(op(8, 8), src_rank=1)
    assert list(coalesce([op(0, 0), other])) == [op(0, 0), other]


def test_pieces_of_the_engine_cover_what_the_plan_copies():
    sources, params = case(ParallelLayout(world_size=4, tp=4), tp_size=2, tp_rank=1)
    plan = plan_for(SPEC, sources, params, tp_rank=1, tp_size=2)
    for name, param in params.items():
        pieces = sglang_pieces(SPEC, name, param.shape, tp_rank=1, tp_size=2)
        copied = sum(op.num_bytes for op in plan.copies if op.dst_param == name)
        assert copied == 4 * sum(piece.rows * piece.cols for piece in pieces), name
