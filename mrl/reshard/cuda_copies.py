"""A plan as one kernel launch: its operations are cut into tiles and uploaded once, each run replays them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mrl import ops
from mrl.ops import extension, reference
from mrl.reshard.errors import ReshardError
from mrl.reshard.plan import Plan

_TILE_OP = 7
"""Column of a tile: the index of its operation times 32, plus the width of its accesses."""
_FILLS = -1
"""Zero fills read no source; they are spread over the launch like one more rank's bytes."""


def is_compiled() -> bool:
    """Whether the kernels can be had here; where not, `mrl.ops` has warned."""
    return extension.backend() is not reference


class CudaCopies:
    """Implements `mrl.reshard.execute.Copies` on the parameters' device.

    The kernel sums what it reads; the check sums what lies in the parameters afterwards. Zero fills count on both
    sides, as zero.
    """

    def __init__(self, plan: Plan, buffers: Mapping[tuple[int, int], Tensor], params: Mapping[str, Tensor]) -> None:
        self._device = next(iter(params.values())).device
        self._names = [op.dst_param for op in plan.copies] + [fill.dst_param for fill in plan.fills]
        copies = [
            (
                buffers[op.src_rank, op.src_buffer].data_ptr() + op.src_offset,
                op.src_pitch,
                params[op.dst_param].data_ptr() + op.dst_offset,
                op.dst_pitch,
                op.rows,
                op.row_bytes,
            )
            for op in plan.copies
        ]
        fills = [
            (0, 0, params[fill.dst_param].data_ptr() + fill.dst_offset, fill.num_bytes, 1, fill.num_bytes)
            for fill in plan.fills
        ]
        sources = torch.tensor([op.src_rank for op in plan.copies] + [_FILLS] * len(fills))
        self._tiles = ops.build_tiles(torch.tensor(copies + fills), sources=sources).to(self._device)
        self._token = torch.empty(0, device=self._device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def pull(self) -> tuple[int, float, float]:
        """Copy in one launch, sum what lies in the parameters in another, and wait once, for both."""
        start, copied, end = self._events
        # Earlier work on the parameters may sit in other streams.
        torch.cuda.synchronize(self._device)
        start.record()
        sent = ops.batched_strided_copy_checksum_(self._token, self._tiles)
        copied.record()
        sums = torch.cat([sent, ops.checksum(self._tiles, of_source=False)])
        end.record()
        expected, found = sums.tolist()
        if found != expected:
            raise ReshardError(
                f"{self._first_difference()}: checksum {found % 2**64:#x} of all that arrived differs from "
                f"{expected % 2**64:#x} of what was read; something else wrote the engine's weights during the pull, "
                "or memory was corrupted. Pull again"
            )
        return int(found) % 2**64, start.elapsed_time(end) / 1e3, copied.elapsed_time(end) / 1e3

    def _first_difference(self) -> str:
        operations = self._tiles[:, _TILE_OP] // reference.WIDTH_BASE
        for index, name in enumerate(self._names):
            tiles = self._tiles[operations == index]
            if not torch.equal(ops.checksum(tiles, of_source=True), ops.checksum(tiles, of_source=False)):
                return f"parameter {name}"
        return "no parameter differs any more"
