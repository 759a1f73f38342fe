"""Whole pulls on a GPU: one launch gives what the slow reference gives, and the checksum sees what it must."""

import pytest
import torch
from host_cases import host_job
from reshard_cases import bitwise_equal, engine_params, make_spec, plan_for, poisoned, state_and_trainer

from mrl import ops
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.execute_torch import TorchCopies
from mrl.reshard.peer_sums import check_peer_sums

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


class BesideEachOther:
    """Engine ranks of one process, each with its trainer rank on a device of its own; or on one that stands for all."""

    def __init__(self, layout, tp_size, num_devices):
        count = layout.world_size
        job = host_job(SPEC, layout, ranks_per_host=count, ranks_per_device=1, tp_size=tp_size)
        self.devices = [torch.device("cuda", rank % num_devices) for rank in range(count)]
        for own in self.devices:
            for other in self.devices:
                # Torch enables the access that kernels need with its first copy.
                torch.zeros(1, device=own).copy_(torch.zeros(1, device=other))
        self.plans = job.plans(copy_engine_bytes=1)
        self.memory = {(rank, 0): job.memory(rank).to(device) for rank, device in enumerate(self.devices)}
        self.expected = [job.params(rank) for rank in range(count)]
        self.params, self.pullers = [], []
        for plan, device, expected in zip(self.plans, self.devices, self.expected, strict=True):
            self.params.append({name: param.to(device) for name, param in poisoned(expected).items()})
            with torch.cuda.device(device):
                self.pullers.append(Puller(plan, self.memory, self.params[-1], piece_bytes=1024))

    def pull(self):
        results = []
        for device, puller in zip(self.devices, self.pullers, strict=True):
            with torch.cuda.device(device):
                results.append(puller.pull())
        return results


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_copy_engines_bring_other_devices_bytes_and_both_ends_sum_the_same(layout, tp_size, num_devices):
    if torch.cuda.device_count() < num_devices:
        pytest.skip("needs two CUDA devices")
    case = BesideEachOther(layout, tp_size, num_devices)
    assert any(plan.reads for plan in case.plans)
    first, second = case.pull(), case.pull()
    for plan, params, expected, result in zip(case.plans, case.params, case.expected, first, strict=True):
        assert differing(params, expected) == []
        assert (result.bytes, result.ops) == (plan.stats.bytes, plan.stats.copies + plan.stats.fills)
        assert 0 <= result.verify_seconds < result.seconds
        assert result.sums.arrived.keys() == {read.peer for read in plan.reads}
    assert [each.checksum for each in first] == [each.checksum for each in second]
    check_peer_sums([each.sums for each in first], whole_job=True)


def test_a_byte_that_a_copy_engine_brought_wrong_is_found(monkeypatch):
    case = BesideEachOther(LAYOUTS[3], 1, 1)
    copy = ops.copy_engine_copy_

    def copy_and_flip(token, descriptors):
        copy(token, descriptors)
        ops.tensor_from_ptr(int(descriptors[0, 2]), 1, token.device).bitwise_xor_(64)

    check_peer_sums([each.sums for each in case.pull()], whole_job=True)
    monkeypatch.setattr(ops, "copy_engine_copy_", copy_and_flip)
    with pytest.raises(ReshardError, match="engine rank 0 read weights from the device of engine rank 1"):
        check_peer_sums([each.sums for each in case.pull()], whole_job=True)
