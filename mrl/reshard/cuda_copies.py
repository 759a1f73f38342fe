"""A plan on a GPU: local bytes by one kernel launch, other devices' by the copy engines, both at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from mrl import ops
from mrl.ops import extension, reference
from mrl.reshard.descriptors import describe_copies, describe_fills, table
from mrl.reshard.errors import ReshardError
from mrl.reshard.peer_reads import PIECE_BYTES, PeerReads, served_tiles, split_reads
from mrl.reshard.peer_sums import PeerSums, Pulled
from mrl.reshard.plan import Plan

_TILE_OP = 7
"""Column of a tile: the index of its operation times 32, plus the width of its accesses."""
_FILLS = -1
"""Zero fills read no source; they are spread over the launch like one more rank's bytes."""
_MODULUS = 2**64


def is_compiled() -> bool:
    """Whether the kernels can be had here; where not, `mrl.ops` has warned."""
    return extension.backend() is not reference


class CudaCopies:
    """Implements `mrl.reshard.execute.Copies` on the parameters' device.

    The kernel sums what it reads; the check sums what lies in the parameters afterwards. Zero fills count on both
    sides, as zero. What copy engines bring is summed here when it is there, and what they take from this device too:
    these sums are the result's, to be compared with those of the ranks at the other ends.

    Args:
        piece_bytes: most bytes of one copy by a copy engine, a multiple of 16.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Mapping[tuple[int, int], Tensor],
        params: Mapping[str, Tensor],
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._device = next(iter(params.values())).device
        self._rank = plan.rank
        self._names = [op.dst_param for op in plan.copies] + [fill.dst_param for fill in plan.fills]
        descriptors = describe_copies(plan.copies, buffers, params) + describe_fills(plan.fills, params)
        sources = torch.tensor([op.src_rank for op in plan.copies] + [_FILLS] * len(plan.fills), dtype=torch.int64)
        self._tiles = ops.build_tiles(table(descriptors), sources=sources).to(self._device)
        self._token = torch.empty(0, device=self._device)
        portions = split_reads(plan.reads, buffers, params, rank=plan.rank, piece_bytes=piece_bytes)
        self._reads = PeerReads(portions, self._device)
        served = served_tiles(plan.serves, buffers)
        self._served = {reader: tiles.to(self._device) for reader, tiles in served.items()}
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def pull(self) -> Pulled:
        """Copy and sum; the sums of a portion run beside the copies of the next. Waits once, for all."""
        # Earlier work on the parameters may sit in other streams.
        torch.cuda.synchronize(self._device)
        try:
            (sent, found, *served), arrived = self._run()
        except RuntimeError:
            # No memory may be unmapped under copies that are still under way.
            torch.cuda.synchronize(self._device)
            raise
        if found != sent:
            raise ReshardError(
                f"{self._first_difference()}: checksum {found:#x} of all that arrived differs from {sent:#x} of what "
                "was read; something else wrote the engine's weights during the pull, or memory was corrupted. Pull "
                "again"
            )
        start, copied, end = self._events
        seconds = start.elapsed_time(end) / 1e3
        copy_seconds = max(start.elapsed_time(copied) / 1e3, self._reads.seconds_since(start))
        return Pulled(
            checksum=(found + sum(arrived.values())) % _MODULUS,
            seconds=seconds,
            verify_seconds=seconds - copy_seconds,
            sums=PeerSums(rank=self._rank, arrived=arrived, served=dict(zip(self._served, served, strict=True))),
        )

    def _run(self) -> tuple[list[int], dict[int, int]]:
        """[what the kernel read, what lies there; what each reader takes], and what has arrived by its owner."""
        start, copied, end = self._events
        start.record()
        self._reads.begin(start)
        sums = [ops.batched_strided_copy_checksum_(self._token, self._tiles)]
        copied.record()
        sums.append(ops.checksum(self._tiles, of_source=False))
        sums += [ops.checksum(tiles, of_source=True) for tiles in self._served.values()]
        # Last: the host may have to wait for room in the copies' streams.
        arriving = self._reads.finish()
        together = torch.cat([*sums, *(each for _, each in arriving)])
        end.record()
        values = [value % _MODULUS for value in together.tolist()]
        arrived: Counter[int] = Counter()
        for (owner, _), value in zip(arriving, values[len(sums) :], strict=True):
            arrived[owner] = (arrived[owner] + value) % _MODULUS
        return values[: len(sums)], dict(arrived)

    def _first_difference(self) -> str:
        operations = self._tiles[:, _TILE_OP] // reference.WIDTH_BASE
        for index, name in enumerate(self._names):
            tiles = self._tiles[operations == index]
            if not torch.equal(ops.checksum(tiles, of_source=True), ops.checksum(tiles, of_source=False)):
                return f"parameter {name}"
        return "no parameter differs any more"
