"""Pulls through real shared memory, in one process and across two, and what the checksum sees."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import (
    bitwise_equal,
    engine_params,
    layouts,
    make_spec,
    plan_for,
    poisoned,
    pull_rank,
    specs,
    state_and_trainer,
)

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import Puller, open_sources

LAYOUT = ParallelLayout(world_size=4, tp=2, pp=2, vpp=2)
SPEC = make_spec()


@settings(max_examples=30, deadline=None)
@given(
    spec=specs,
    layout=layouts(),
    tp_size=st.sampled_from([1, 2, 4, 8]),
    vocab_multiple=st.sampled_from([1, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_layout_pair_gives_what_the_slow_reference_gives(spec, layout, tp_size, vocab_multiple, dtype):
    state, trainer = state_and_trainer(spec, layout, dtype, vocab_multiple=vocab_multiple)
    for tp_rank in range(tp_size):
        expected = engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size)
        pulled = pull_rank(spec, trainer, expected, tp_rank=tp_rank, tp_size=tp_size)
        for name, param in expected.items():
            assert bitwise_equal(pulled[name], param), name


def test_an_engine_process_pulls_what_the_trainer_process_wrote_since():
    state, trainer = state_and_trainer(SPEC, LAYOUT)
    expected = engine_params(SPEC, state, tp_rank=1, tp_size=2)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            params = poisoned(expected)
            plan = plan_for(SPEC, trainer.sources, params, tp_rank=1, tp_size=2)
            puller = Puller(plan, open_sources(plan, trainer.sources), params)
            puller.pull()
            first = all(bitwise_equal(params[name], expected[name]) for name in expected)
            os.write(ready[1], b"r")
            os.read(go[0], 1)
            puller.pull()
            norm = params["model.norm.weight"]
            qkv = params["model.layers.3.self_attn.qkv_proj.weight"]
            status = 0 if first and bool((norm == 2.5).all()) and bool((qkv == -4).all()) else 2
        finally:
            os._exit(status)
    os.read(ready[0], 1)
    for shard in trainer.memory:
        for name, value in (
            ("decoder.final_layernorm.weight", 2.5),
            ("decoder.layers.3.self_attention.linear_qkv.weight", -4),
        ):
            if name in shard:
                shard[name].fill_(value)
    os.write(go[1], b"g")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_result_counts_the_plan_and_equal_weights_give_equal_checksums():
    state, trainer = state_and_trainer(SPEC, LAYOUT)
    params = poisoned(engine_params(SPEC, state, tp_rank=0, tp_size=2))
    plan = plan_for(SPEC, trainer.sources, params, tp_rank=0, tp_size=2)
    puller = Puller(plan, open_sources(plan, trainer.sources), params)
    first, second = puller.pull(), puller.pull()
    assert (first.bytes, first.ops) == (plan.stats.bytes, plan.stats.copies + plan.stats.fills)
    assert first.checksum == second.checksum
    trainer.memory[0]["embedding.word_embeddings.weight"].view(torch.int32)[0, 0] += 1
    assert puller.pull().checksum != first.checksum


def test_a_copy_that_is_overwritten_during_the_pull_is_named():
    # Two parameters on one memory: the second copy destroys the first, as a write from outside would.
    state, trainer = state_and_trainer(SPEC, LAYOUT)
    params = poisoned(engine_params(SPEC, state, tp_rank=0, tp_size=2))
    one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    params[two] = params[one]
    plan = plan_for(SPEC, trainer.sources, params, tp_rank=0, tp_size=2)
    with pytest.raises(ReshardError, match=f"parameter {one}: checksum"):
        Puller(plan, open_sources(plan, trainer.sources), params).pull()


def test_a_parameter_that_moved_since_is_refused_and_nothing_is_written():
    state, trainer = state_and_trainer(SPEC, LAYOUT)
    params = poisoned(engine_params(SPEC, state, tp_rank=0, tp_size=2))
    plan = plan_for(SPEC, trainer.sources, params, tp_rank=0, tp_size=2)
    puller = Puller(plan, open_sources(plan, trainer.sources), params)
    norm = params["model.norm.weight"]
    norm.data = norm.data.clone()
    with pytest.raises(ReshardError, match=r"moved parameter model\.norm\.weight"):
        puller.pull()
    assert all(bool(param.isnan().all()) for param in params.values())


def test_parameters_at_odd_addresses_are_copied_in_narrower_words():
    spec = make_spec(hidden_size=3, intermediate_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=1)
    state, trainer = state_and_trainer(spec, ParallelLayout(world_size=2, tp=2), torch.bfloat16)
    expected = engine_params(spec, state, tp_rank=0, tp_size=1)
    params = {}
    for name, param in expected.items():
        memory = torch.full((param.numel() + 1,), torch.nan, dtype=torch.bfloat16)
        params[name] = memory[1:].view(param.shape)
    plan = plan_for(spec, trainer.sources, params)
    Puller(plan, open_sources(plan, trainer.sources), params).pull()
    assert all(bitwise_equal(params[name], expected[name]) for name in expected)


def test_parameters_that_are_not_the_planned_ones_are_refused():
    state, trainer = state_and_trainer(SPEC, LAYOUT)
    params = engine_params(SPEC, state, tp_rank=0, tp_size=1)
    params = {name: param.contiguous() for name, param in params.items()}
    plan = plan_for(SPEC, trainer.sources, params)
    buffers = open_sources(plan, trainer.sources)
    fewer = {name: param for name, param in params.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"model\.norm\.weight are in the plan but not in the module"):
        Puller(plan, buffers, fewer)
    with pytest.raises(ValueError, match="build the plan again"):
        Puller(plan, buffers, {**params, "model.norm.weight": torch.zeros(9)})
    with pytest.raises(ValueError, match="were not opened"):
        Puller(plan, {}, params)
