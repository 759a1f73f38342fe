"""Whole pulls on a GPU: one launch gives what the slow reference gives, and the checksum sees what it must."""

import pytest
import torch
from reshard_cases import bitwise_equal, engine_params, make_spec, plan_for, poisoned, state_and_trainer

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.execute_torch import TorchCopies

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SPEC = make_spec()
LAYOUTS = [
    ParallelLayout(world_size=1),
    ParallelLayout(world_size=2, tp=2),
    ParallelLayout(world_size=4, tp=2, pp=2, vpp=2),
    ParallelLayout(world_size=2, pp=2),
]


def on_gpu(spec, layout, *, tp_rank, tp_size, dtype=torch.bfloat16):
    """(plan, trainer buffers on the GPU, poisoned parameters there, what they should become)."""
    state, trainer = state_and_trainer(spec, layout, dtype)
    expected = engine_params(spec, state, tp_rank=tp_rank, tp_size=tp_size)
    params = {name: param.cuda() for name, param in poisoned(expected).items()}
    plan = plan_for(spec, trainer.sources, params, tp_rank=tp_rank, tp_size=tp_size)
    buffers = {key: buffer.cuda() for key, buffer in open_sources(plan, trainer.sources).items()}
    return plan, buffers, params, expected


def differing(params, expected):
    return [name for name in expected if not bitwise_equal(params[name].cpu(), expected[name])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layout_pair_gives_what_the_slow_reference_gives(layout, tp_size, dtype):
    for tp_rank in {0, tp_size - 1}:
        plan, buffers, params, expected = on_gpu(SPEC, layout, tp_rank=tp_rank, tp_size=tp_size, dtype=dtype)
        result = Puller(plan, buffers, params).pull()
        assert differing(params, expected) == []
        assert (result.bytes, result.ops) == (plan.stats.bytes, plan.stats.copies + plan.stats.fills)


def test_a_replay_brings_the_weights_of_that_time():
    plan, buffers, params, expected = on_gpu(SPEC, LAYOUTS[2], tp_rank=1, tp_size=2)
    puller = Puller(plan, buffers, params)
    first = puller.pull()
    for param in params.values():
        param.fill_(torch.nan)
    assert puller.pull().checksum == first.checksum
    assert differing(params, expected) == []
    for buffer in buffers.values():
        buffer.bitwise_not_()
    assert puller.pull().checksum != first.checksum
    assert "model.norm.weight" in differing(params, expected)


def test_parameters_at_odd_addresses_are_copied_in_narrower_words():
    spec = make_spec(hidden_size=3, intermediate_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=1)
    plan, buffers, params, expected = on_gpu(spec, LAYOUTS[1], tp_rank=0, tp_size=1)
    moved = {}
    for name, param in params.items():
        memory = torch.full((param.numel() + 1,), torch.nan, dtype=param.dtype, device="cuda")
        moved[name] = memory[1:].view(param.shape)
    Puller(plan, buffers, moved).pull()
    assert differing(moved, expected) == []


def test_a_copy_that_is_overwritten_during_the_pull_is_named():
    plan, buffers, params, _ = on_gpu(SPEC, LAYOUTS[0], tp_rank=0, tp_size=1)
    one, two = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    params[two] = params[one]
    with pytest.raises(ReshardError, match=r"parameter model\.layers\.[01]\.input_layernorm\.weight: checksum"):
        Puller(plan, buffers, params).pull()


def test_torch_copies_on_the_gpu_where_the_kernels_cannot_be_built():
    plan, buffers, params, expected = on_gpu(SPEC, LAYOUTS[1], tp_rank=1, tp_size=2)
    copies = TorchCopies(plan, buffers, {name: param.view(-1).view(torch.uint8) for name, param in params.items()})
    copies.pull()
    assert differing(params, expected) == []
