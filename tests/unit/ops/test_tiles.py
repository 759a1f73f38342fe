import numpy as np
import pytest
import torch
from plans import random_plan

from mrl.ops import reference

SEEDS = range(6)
TOKEN = torch.empty(0)
TILE_BYTES = 256
TILE = {name: index for index, name in enumerate(reference.Tile.__slots__)}


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def slow_checksum(runs):
    """Sum over (position, bytes), one byte at a time."""
    mask, total = 2**64 - 1, 0
    for position, data in runs:
        for offset, byte in enumerate(data.tolist()):
            word, shift = divmod(position + offset, 8)
            mixed = (word + 1) * 0x9E3779B97F4A7C15 & mask
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & mask | 1
            total = total + (byte << 8 * shift) * mixed & mask
    return total


def unsigned(total):
    return int(total) % 2**64


def test_tiles_of_a_hand_worked_plan(ops):
    descriptors = table(
        (4096, 500, 8192, 300, 3, 100),  # rows apart, 4-byte accesses, two rows in a tile of 256
        (16384, 320, 32768, 320, 2, 320),  # rows end to end: one run of 640, in three parts of 256, 256 and 128
        (0, 0, 65536, 24, 1, 24),  # a fill
    )
    assert ops.build_tiles(descriptors, TILE_BYTES).tolist() == [
        [4096, 500, 8192, 300, 2, 100, 0, 4],
        [5096, 500, 8792, 300, 1, 100, 200, 4],
        [16384, 640, 32768, 640, 1, 256, 304, 32 + 16],
        [16640, 640, 33024, 640, 1, 256, 560, 32 + 16],
        [16896, 640, 33280, 640, 1, 128, 816, 32 + 16],
        [0, 0, 65536, 24, 1, 24, 944, 64 + 8],
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tile_bytes", [128, 1024])
def test_compiled_tiles_equal_the_reference(compiled, seed, tile_bytes):
    descriptors = random_plan(seed).descriptors
    sources = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(descriptors)))
    for given in (None, sources):
        ours = compiled.build_tiles(descriptors, tile_bytes, given)
        assert torch.equal(ours, reference.build_tiles(descriptors, tile_bytes, given))
        assert int((ours[:, TILE["rows"]] * ours[:, TILE["row_bytes"]]).max()) <= tile_bytes


def test_sources_run_dry_together(ops):
    descriptors = table((1 << 20, 0, 1 << 24, 0, 1, 32 * TILE_BYTES), (1 << 22, 0, 1 << 25, 0, 1, 8 * TILE_BYTES))
    tiles = ops.build_tiles(descriptors, TILE_BYTES, torch.tensor([5, 2]))
    remote = (tiles[:, TILE["op_and_width"]] // 32 == 1).cumsum(0)
    share = torch.arange(1, 41) / 40
    assert ((remote / 8 - share).abs() <= 1 / 8).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_checksum", [False, True])
def test_copy_moves_every_byte_at_any_alignment(ops, seed, with_checksum):
    plan = random_plan(seed)
    expected = plan.expected()
    tiles = ops.build_tiles(plan.descriptors, TILE_BYTES)
    (ops.batched_strided_copy_checksum_ if with_checksum else ops.batched_strided_copy_)(TOKEN, tiles)
    assert np.array_equal(plan.target, expected)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_checksums_are_those_of_the_definition(ops, seed):
    plan = random_plan(seed)
    tiles = ops.build_tiles(plan.descriptors, TILE_BYTES)
    copied = unsigned(ops.batched_strided_copy_checksum_(TOKEN, tiles))
    runs, position = [], 0
    for _, _, to, pitch, rows, size in plan.ops:
        runs += [(position + row * size, plan.target[to + row * pitch :][:size]) for row in range(rows)]
        position += -(-rows * size // 16) * 16
    assert copied == slow_checksum(runs)
    assert copied == unsigned(ops.checksum(tiles, True)) == unsigned(ops.checksum(tiles, False))


def test_checksum_depends_on_neither_tile_size_nor_order(ops):
    plan = random_plan(0)
    sums = set()
    for tile_bytes in (128, 384, 4096):
        tiles = ops.build_tiles(plan.descriptors, tile_bytes)
        sums |= {unsigned(ops.checksum(part, True)) for part in (tiles, tiles.flip(0).contiguous())}
    assert len(sums) == 1


def test_checksum_of_selected_tiles_adds_up(ops):
    tiles = ops.build_tiles(random_plan(1).descriptors, TILE_BYTES)
    first = tiles[:, TILE["op_and_width"]] // 32 < 11
    parts = sum(unsigned(ops.checksum(tiles[chosen], True)) for chosen in (first, ~first))
    assert parts % 2**64 == unsigned(ops.checksum(tiles, True))


@pytest.mark.parametrize("damage", ["bit", "swapped words", "swapped tiles"])
def test_checksum_notices_damage(ops, damage):
    source, target = (np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8) for _ in range(2))
    tiles = ops.build_tiles(table((source.ctypes.data, 4096, target.ctypes.data, 4096, 1, 4096)), TILE_BYTES)
    sent = ops.batched_strided_copy_checksum_(TOKEN, tiles)
    if damage == "bit":
        target[1234] ^= 64
    else:
        size = 8 if damage == "swapped words" else TILE_BYTES
        target[:size], target[size : 2 * size] = target[size : 2 * size].copy(), target[:size].copy()
    assert unsigned(ops.checksum(tiles, False)) != unsigned(sent)


def test_an_empty_plan_does_nothing(ops):
    tiles = ops.build_tiles(torch.empty(0, 6, dtype=torch.int64), TILE_BYTES)
    assert tiles.shape == (0, 8)
    assert unsigned(ops.batched_strided_copy_checksum_(TOKEN, tiles)) == 0


def test_tensor_from_ptr_sees_the_same_memory(ops):
    memory = torch.arange(40, dtype=torch.uint8)
    view = ops.tensor_from_ptr(memory.data_ptr() + 8, 32, torch.device("cpu"))
    memory[8] = 99
    assert torch.equal(view, memory[8:])
