"""Copies by the copy engines: the same bytes as the slow loop, on the CPU, on one GPU and between two."""

import pytest
import torch
from plans import random_plan

TOKEN = torch.empty(0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def copies_only(seed, **size):
    plan = random_plan(seed, **size)
    plan.ops = [op for op in plan.ops if op[0] is not None]
    return plan


class BetweenDevices:
    """A random plan whose source lies on the last device and whose target on the first."""

    def __init__(self, seed, source_device, **size):
        self.plan = copies_only(seed, **size)
        self.source = torch.from_numpy(self.plan.source).to(source_device)
        self.target = torch.from_numpy(self.plan.target).to("cuda:0")
        # Known to both devices' streams before any copy.
        torch.cuda.synchronize(source_device)
        self.descriptors = self.plan.descriptors
        self.descriptors[:, 0] += self.source.data_ptr() - self.plan.source.ctypes.data
        self.descriptors[:, 2] += self.target.data_ptr() - self.plan.target.ctypes.data

    def is_copied(self):
        return torch.equal(self.target.cpu(), torch.from_numpy(self.plan.expected()))


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_is_copied_at_any_alignment(ops, seed):
    plan = copies_only(seed)
    expected = plan.expected()
    ops.copy_engine_copy_(TOKEN, plan.descriptors)
    assert (plan.target == expected).all()


def test_no_operation_is_no_copy(ops):
    ops.copy_engine_copy_(TOKEN, torch.empty(0, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), r"\[2, 5\] Long .* \[num_ops, 6\]"),
        (torch.tensor([[64, 8, 64, 8, 2, 16]]), r"operation 0 \(src 64, src_pitch 8, .* row_bytes 16\)"),
        (torch.tensor([[64, 8, 640, 8, 1, 8], [0, 8, 64, 8, 1, 8]]), "operation 1 is a fill"),
    ],
)
def test_what_is_no_copy_is_refused(compiled, descriptors, message):
    with pytest.raises(RuntimeError, match=message):
        compiled.copy_engine_copy_(TOKEN, descriptors)


def test_opcheck(compiled):
    plan = copies_only(0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compiled.copy_engine_copy_.default, (TOKEN, plan.descriptors), test_utils=checks)


@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_one_device_at_any_alignment(ops, seed):
    case = BetweenDevices(seed, "cuda:0", num_ops=400, num_bytes=1 << 20)
    ops.copy_engine_copy_(case.target, case.descriptors)
    assert case.is_copied()


@needs_two
@pytest.mark.parametrize("seed", range(3))
def test_two_devices_at_any_alignment(compiled, seed):
    case = BetweenDevices(seed, "cuda:1", num_ops=400, num_bytes=1 << 20)
    compiled.copy_engine_copy_(case.target, case.descriptors)
    assert case.is_copied()


@needs_two
def test_thousands_of_small_copies_between_devices_all_arrive(compiled):
    source = torch.randint(0, 256, (5000, 4096), dtype=torch.uint8, device="cuda:1")
    torch.cuda.synchronize("cuda:1")
    target = torch.zeros(5000, 4096, dtype=torch.uint8, device="cuda:0")
    place = torch.arange(5000) * 4096
    run = torch.full((5000,), 4096)
    from_, to = source.data_ptr() + place, target.data_ptr() + place
    compiled.copy_engine_copy_(target, torch.stack([from_, run, to, run, torch.ones_like(run), run], dim=1))
    assert torch.equal(target.cpu(), source.cpu())


@needs_gpu
def test_copies_follow_the_current_stream(compiled):
    source = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    descriptors = torch.tensor([[source.data_ptr(), 1 << 13, target.data_ptr(), 1 << 13, 1 << 13, 1 << 12]])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.fill_(7)
        compiled.copy_engine_copy_(target, descriptors)
        copied = target.view(1 << 13, 1 << 13)[:, : 1 << 12].clone()
    stream.synchronize()
    assert (copied == 7).all()
