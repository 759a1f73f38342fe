"""A plan as torch copies: one strided view on either side of every operation. Any device; the way of the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from mrl.reshard.errors import ReshardError
from mrl.reshard.operations import CopyOp
from mrl.reshard.peer_sums import PeerSums, Pulled
from mrl.reshard.plan import Plan

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class TorchCopies:
    """Implements `mrl.reshard.execute.Copies`. The check sums the words of each operation on both sides.

    So nothing is left to compare with other engine ranks, and where they read nothing is summed.
    """

    def __init__(self, plan: Plan, buffers: Mapping[tuple[int, int], Tensor], params: Mapping[str, Tensor]) -> None:
        copies = list(plan.host_copies)
        self._names = [op.dst_param for op in copies]
        self._pairs = [copy_views(op, buffers[op.src_rank, op.src_buffer], params[op.dst_param]) for op in copies]
        self._tails = [params[fill.dst_param].narrow(0, fill.dst_offset, fill.num_bytes) for fill in plan.fills]
        self._on_gpu = any(param.is_cuda for param in params.values())
        self._sums = PeerSums(
            rank=plan.rank,
            arrived=dict.fromkeys(read.peer for read in plan.reads),
            served=dict.fromkeys(serve.peer for serve in plan.serves),
        )

    def pull(self) -> Pulled:
        """Copy one operation after the other, then sum both sides; see `mrl.reshard.execute.Copies`."""
        start = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source)
        for tail in self._tails:
            tail.zero_()
        if self._on_gpu:
            torch.cuda.synchronize()
        verify_start = time.perf_counter()
        checksum = self._verify()
        end = time.perf_counter()
        return Pulled(checksum=checksum, seconds=end - start, verify_seconds=end - verify_start, sums=self._sums)

    def _verify(self) -> int:
        if not self._pairs:
            return 0
        # Sums stay on the device until all are done: one transfer on a GPU.
        sent = torch.stack([source.sum(dtype=torch.int64) for _, source in self._pairs]).tolist()
        arrived = torch.stack([target.sum(dtype=torch.int64) for target, _ in self._pairs]).tolist()
        for name, expected, found in zip(self._names, sent, arrived, strict=True):
            if expected != found:
                raise ReshardError(
                    f"parameter {name}: checksum {found:#x} of what arrived differs from {expected:#x} of what the "
                    "trainer holds; it changed its weights during the pull, or memory was corrupted. Pull again"
                )
        return sum(arrived) % 2**64


def copy_views(op: CopyOp, buffer: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """(target, source) of one copy as [rows, words] views of the widest word that both sides are aligned to."""
    strides = (op.src_pitch, op.dst_pitch) if op.rows > 1 else ()
    places = (buffer.data_ptr() + op.src_offset, param.data_ptr() + op.dst_offset)
    word = math.gcd(8, op.row_bytes, *strides, *places)
    return (
        word_view(param, op.dst_offset, op.dst_pitch, op.rows, op.row_bytes, word),
        word_view(buffer, op.src_offset, op.src_pitch, op.rows, op.row_bytes, word),
    )


def word_view(memory: Tensor, offset: int, pitch: int, rows: int, row_bytes: int, word: int) -> Tensor:
    """Rows of bytes as words of `word` bytes, which divides everything else. [rows, row_bytes / word]"""
    span = (rows - 1) * pitch + row_bytes
    words = memory.narrow(0, offset, span).view(_WORDS[word])
    return words.as_strided((rows, row_bytes // word), (pitch // word, 1))
