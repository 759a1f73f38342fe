"""Parameters that are the trainer's memory: which they are, that nothing else is lost, and that memory is shared."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import (
    bitwise_equal,
    engine_params,
    layouts,
    make_spec,
    moe_specs,
    poisoned,
    specs,
    state_and_trainer,
)

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.aliases import ALIGNMENT_BYTES
from mrl.reshard.execute import Puller, bind_aliases, open_sources
from mrl.reshard.layout import targets_of
from mrl.reshard.plan import build_plan

ONE_GROUP = make_spec(num_key_value_heads=2, vocab_size=64, hidden_size=32, intermediate_size=64)
"""One query group per rank at TP2, and a vocabulary that nobody pads."""
NORM = "model.norm.weight"


def plan_aliases(spec, sources, params, *, tp_rank=0, tp_size=1, ep_size=1, host="host", device=-1, alias=True):
    targets = targets_of(params.items())
    place = {"tp_rank": tp_rank, "tp_size": tp_size, "ep_size": ep_size, "host": host, "device": device}
    return build_plan(spec, sources, targets, alias=alias, **place)


def names_without_layer(plan):
    return {alias.dst_param.split(".", 3)[-1] if ".layers." in alias.dst_param else alias.dst_param for alias in plan}


def aliased(spec, layout, *, tp_size, tp_rank=0):
    state, trainer = state_and_trainer(spec, layout)
    params = poisoned(engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size))
    return names_without_layer(plan_aliases(spec, trainer.sources, params, tp_rank=tp_rank, tp_size=tp_size).aliases)


@settings(max_examples=30, deadline=None)
@given(
    spec=specs,
    layout=layouts(),
    tp_size=st.sampled_from([1, 2, 4]),
    vocab_multiple=st.sampled_from([1, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_aliases_copies_and_fills_together_are_every_byte_once(spec, layout, tp_size, vocab_multiple, dtype):
    state, trainer = state_and_trainer(spec, layout, dtype, vocab_multiple=vocab_multiple)
    for tp_rank in range(tp_size):
        expected = engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size)
        params = poisoned(expected)
        plan = plan_aliases(spec, trainer.sources, params, tp_rank=tp_rank, tp_size=tp_size)
        stats = plan.stats
        assert stats.bytes + stats.fill_bytes + stats.aliased_bytes == sum(param.nbytes for param in params.values())
        assert not {alias.dst_param for alias in plan.aliases} & {op.dst_param for op in (*plan.copies, *plan.fills)}
        buffers = open_sources(plan, trainer.sources)
        bind_aliases(plan, buffers, params)
        for name in {alias.dst_param for alias in plan.aliases}:
            assert bitwise_equal(params[name], expected[name]), name
        Puller(plan, buffers, params).pull()
        assert all(bitwise_equal(params[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_equal_layouts_alias_everything_where_each_rank_has_one_query_group(tp_rank):
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=2, tp=2))
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=tp_rank, tp_size=2))
    plan = plan_aliases(ONE_GROUP, trainer.sources, params, tp_rank=tp_rank, tp_size=2)
    assert {alias.dst_param for alias in plan.aliases} == params.keys()
    assert {alias.src_rank for alias in plan.aliases if "proj.weight" in alias.dst_param} == {tp_rank}
    assert (plan.copies, plan.fills, plan.stats.bytes) == ((), (), 0)


def test_what_is_interleaved_or_padded_otherwise_is_copied():
    # Two query groups per rank; SGLang pads 50 rows to 64, of which rank 1 lacks some in the trainer's.
    spec = make_spec(hidden_size=32, intermediate_size=64)
    layout = ParallelLayout(world_size=2, tp=2)
    everywhere = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
        NORM,
    }
    assert aliased(spec, layout, tp_size=2, tp_rank=1) == everywhere


def test_of_another_tensor_parallel_size_only_what_is_whole_on_every_rank_is_aliased():
    spec = make_spec(vocab_size=50, hidden_size=32, intermediate_size=64)
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", NORM}
    assert aliased(spec, ParallelLayout(world_size=2, tp=2), tp_size=1) == norms
    # A quarter of the vocabulary lies in one piece in a rank that holds half of it; so do the last query heads of a
    # group with its key and value, but not the first, and their biases not at an address that will do.
    vocabulary = {"model.embed_tokens.weight", "lm_head.weight"}
    qkv = {"self_attn.qkv_proj.weight"}
    halves = ParallelLayout(world_size=2, tp=2)
    assert aliased(ONE_GROUP, halves, tp_size=4, tp_rank=0) == norms | vocabulary
    assert aliased(ONE_GROUP, halves, tp_size=4, tp_rank=1) == norms | vocabulary | qkv


@settings(max_examples=5, deadline=None)
@given(spec=moe_specs)
def test_experts_are_copied_into_one_parameter(spec):
    names = aliased(spec, ParallelLayout(world_size=2, tp=2), tp_size=2)
    assert NORM in names
    assert not {name for name in names if "w13" in name or "w2" in name}


def test_pipeline_stages_and_replicas_are_aliased_from_the_lowest_rank_that_holds_the_parameter():
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=8, tp=2, pp=2))
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=1, tp_size=2))
    plan = plan_aliases(ONE_GROUP, trainer.sources, params, tp_rank=1, tp_size=2)
    ranks = {alias.dst_param: alias.src_rank for alias in plan.aliases}
    held = {source.rank: {param.name for param in source.params} for source in trainer.sources}
    first = min(rank for rank, names in held.items() if "embedding.word_embeddings.weight" in names and rank % 2)
    last = min(rank for rank, names in held.items() if "output_layer.weight" in names and rank % 2)
    assert ranks.keys() == params.keys()
    assert (ranks["model.embed_tokens.weight"], ranks["lm_head.weight"]) == (first, last)


def test_memory_of_another_device_or_host_is_not_aliased():
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=2, tp=2), first_device=0)
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=0, tp_size=2))
    own = plan_aliases(ONE_GROUP, trainer.sources, params, tp_size=2, device=0)
    peer = plan_aliases(ONE_GROUP, trainer.sources, params, tp_size=2, device=1)
    assert {alias.dst_param for alias in own.aliases} == params.keys()
    # What rank 1 holds whole is on device 1, the halves of tensor-parallel rank 0 are not.
    assert names_without_layer(peer.aliases) == {"input_layernorm.weight", "post_attention_layernorm.weight", NORM}
    assert not plan_aliases(ONE_GROUP, trainer.sources, params, tp_size=2, device=7).aliases
    state, replicas = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=2))
    sources = [replace(replicas.sources[0], host="other"), replicas.sources[1]]
    whole = poisoned(engine_params(ONE_GROUP, state, tp_rank=0, tp_size=1))
    assert {alias.src_rank for alias in plan_aliases(ONE_GROUP, sources, whole).aliases} == {1}


def test_a_parameter_at_an_address_that_kernels_cannot_read_is_copied():
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=1))
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=0, tp_size=1))
    source = trainer.sources[0]
    shifted = tuple(
        replace(param, offset_bytes=param.offset_bytes + ALIGNMENT_BYTES // 2)
        if param.name == "decoder.final_layernorm.weight"
        else param
        for param in source.params
    )
    plan = plan_aliases(ONE_GROUP, [replace(source, params=shifted)], params)
    assert NORM not in {alias.dst_param for alias in plan.aliases}
    assert NORM in {op.dst_param for op in plan.copies}


def test_nothing_is_aliased_unless_asked_for_and_the_digest_tells():
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=1))
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=0, tp_size=1))
    with_aliases, without = (plan_aliases(ONE_GROUP, trainer.sources, params, alias=alias) for alias in (True, False))
    assert with_aliases.aliases
    assert not without.aliases
    assert with_aliases.digest != without.digest


def test_the_trainers_writes_are_seen_without_a_pull_and_a_pull_writes_nothing_there():
    state, trainer = state_and_trainer(make_spec(hidden_size=32), ParallelLayout(world_size=1))
    spec = make_spec(hidden_size=32)
    params = poisoned(engine_params(spec, state, tp_rank=0, tp_size=1))
    plan = plan_aliases(spec, trainer.sources, params)
    buffers = open_sources(plan, trainer.sources)
    bind_aliases(plan, buffers, params)
    before = {name: tensor.clone() for name, tensor in trainer.memory[0].items()}
    puller = Puller(plan, buffers, params)
    puller.pull()
    assert all(bitwise_equal(trainer.memory[0][name], tensor) for name, tensor in before.items())
    trainer.memory[0]["decoder.final_layernorm.weight"].fill_(7.0)
    assert bool((params[NORM] == 7).all())


def test_parameters_that_are_not_the_planned_ones_are_refused():
    state, trainer = state_and_trainer(ONE_GROUP, ParallelLayout(world_size=1))
    params = poisoned(engine_params(ONE_GROUP, state, tp_rank=0, tp_size=1))
    plan = plan_aliases(ONE_GROUP, trainer.sources, params)
    buffers = open_sources(plan, trainer.sources)
    with pytest.raises(ValueError, match="build the plan again"):
        bind_aliases(plan, buffers, {**params, NORM: torch.zeros(9)})
