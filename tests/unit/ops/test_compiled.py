"""What torch asks of a compiled op: schema, fake implementation, refusals that name the values."""

import pytest
import torch
from plans import random_plan
from torch._subclasses.fake_tensor import FakeTensorMode

from mrl.ops import fake

TOKEN = torch.empty(0)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""All of opcheck but the compiler's part, which takes seconds to import; tests/integration runs the whole."""


@pytest.fixture
def tiles(compiled):
    plan = random_plan(0)
    result = compiled.build_tiles(plan.descriptors, 1024)
    yield result
    assert plan.source.size  # The plan's memory must outlive its tiles.


def test_opcheck_of_the_copy(compiled, tiles):
    torch.library.opcheck(compiled.batched_strided_copy_.default, (TOKEN, tiles), test_utils=CHECKS)
    torch.library.opcheck(compiled.batched_strided_copy_checksum_.default, (TOKEN, tiles), test_utils=CHECKS)


@pytest.mark.parametrize("of_source", [False, True])
def test_opcheck_of_the_checksum(compiled, tiles, of_source):
    torch.library.opcheck(compiled.checksum.default, (tiles, of_source), test_utils=CHECKS)


def test_opcheck_of_the_builder(compiled):
    plan = random_plan(1)
    sources = torch.arange(len(plan.ops)) % 3
    torch.library.opcheck(compiled.build_tiles.default, (plan.descriptors, 256, sources), test_utils=CHECKS)


def test_opcheck_of_a_raw_view(compiled):
    memory = torch.arange(64, dtype=torch.uint8)
    arguments = (memory.data_ptr(), 64, torch.device("cpu"))
    # No tensor goes in, so there is nothing to differentiate.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(compiled.tensor_from_ptr.default, arguments, test_utils=checks)


def test_fake_results_live_where_the_tiles_do(compiled):
    with FakeTensorMode():
        tiles = torch.empty(5, fake.TILE_FIELDS, dtype=torch.int64, device="cuda")
        total = compiled.checksum(tiles, True)
        assert (total.shape, total.dtype, total.device.type) == ((1,), torch.int64, "cuda")
        assert compiled.batched_strided_copy_(tiles, tiles) is None
        with pytest.raises(NotImplementedError, match="belong to a process"):
            compiled.ipc_open(torch.empty(64, dtype=torch.uint8), torch.device("cuda"))


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), r"\[2, 5\] Long .* \[num_ops, 6\]"),
        (torch.zeros(2, 6), r"\[2, 6\] Float"),
        (torch.zeros(6, 2, dtype=torch.int64).T, r"strides \[1, 2\]"),
        (torch.tensor([[64, 8, 64, 8, 2, 16]]), r"operation 0 \(src 64, src_pitch 8, .* row_bytes 16\)"),
        (torch.tensor([[64, 0, 0, 0, 1, 16]]), r"operation 0 \(.* dst 0, .*must be positive"),
        (torch.tensor([[64, 0, 64, 0, 1, 16], [64, 0, 64, 0, 0, 16]]), r"operation 1 \(.* rows 0,"),
    ],
)
def test_bad_descriptors_are_refused(compiled, descriptors, message):
    with pytest.raises(RuntimeError, match=message):
        compiled.build_tiles(descriptors, 1024)


@pytest.mark.parametrize("tile_bytes", [0, 64, 1000, 1 << 21])
def test_bad_tile_sizes_are_refused(compiled, tile_bytes):
    with pytest.raises(RuntimeError, match=f"tile_bytes = {tile_bytes} must be a multiple of 128 of at most 1048576"):
        compiled.build_tiles(torch.empty(0, 6, dtype=torch.int64), tile_bytes)


def test_sources_must_name_every_operation(compiled):
    with pytest.raises(RuntimeError, match=r"sources \[3\] Long on cpu must be contiguous int64 \[2\]"):
        compiled.build_tiles(torch.tensor([[64, 8, 640, 8, 1, 8]] * 2), 1024, torch.arange(3))


def test_bad_tiles_are_refused(compiled):
    with pytest.raises(RuntimeError, match=r"tiles \[3, 6\] .* \[num_tiles, 8\]"):
        compiled.batched_strided_copy_(TOKEN, torch.zeros(3, 6, dtype=torch.int64))


def test_a_raw_view_of_nothing_is_refused(compiled):
    with pytest.raises(RuntimeError, match="no memory of 0 bytes at address 64"):
        compiled.tensor_from_ptr(64, 0, torch.device("cpu"))
