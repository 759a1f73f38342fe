"""Runs a plan: replays its copies into an engine's parameters and compares what arrived with what was sent."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceRank, targets_of
from mrl.reshard.operations import CopyOp
from mrl.reshard.plan import Plan
from mrl.reshard.transport import open_buffer

BufferKey = tuple[int, int]
"""(trainer rank, index into its buffers)."""

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(kw_only=True, frozen=True)
class PullResult:
    """What one pull did."""

    bytes: int
    ops: int
    """Copies and fills."""
    seconds: float
    """Copy and verification."""
    verify_seconds: float
    checksum: int
    """Sum of all words that arrived, modulo 2^64; equal weights under one plan give equal sums."""


def open_sources(plan: Plan, sources: Sequence[SourceRank]) -> dict[BufferKey, Tensor]:
    """Open the buffers that the plan reads, and no others; ReshardError as `open_buffer`."""
    by_rank = {source.rank: source for source in sources}
    keys = sorted({(op.src_rank, op.src_buffer) for op in plan.copies})
    return {(rank, index): open_buffer(by_rank[rank].buffers[index]) for rank, index in keys}


class Puller:
    """A plan bound to memory: views are made once, each `pull` only copies.

    Args:
        buffers: [num_bytes] uint8 of every trainer buffer the plan reads; see `open_sources`.
        params: the engine rank's live parameters by name.

    Raises:
        ValueError: the parameters are not those the plan was made for, or a buffer is missing.
    """

    def __init__(self, plan: Plan, buffers: Mapping[BufferKey, Tensor], params: Mapping[str, Tensor]) -> None:
        names = [target.name for target in plan.targets]
        _check_same_params(plan, params)
        missing = sorted({(op.src_rank, op.src_buffer) for op in plan.copies} - set(buffers))
        if missing:
            raise ValueError(f"buffers {missing} (trainer rank, index) are in the plan but were not opened")
        flat = {name: params[name].detach().view(-1).view(torch.uint8) for name in names}
        self._plan = plan
        self._places = [(params[name], params[name].data_ptr()) for name in names]
        self._names = [op.dst_param for op in plan.copies]
        self._pairs = [_views(op, buffers[op.src_rank, op.src_buffer], flat[op.dst_param]) for op in plan.copies]
        self._tails = [flat[fill.dst_param].narrow(0, fill.dst_offset, fill.num_bytes) for fill in plan.fills]

    @torch.no_grad()
    def pull(self) -> PullResult:
        """Overwrite every parameter with the trainer's current weights; returns when the bytes have arrived.

        The trainer must not write its parameters meanwhile; if it does, the checksums differ. They are sums of the
        copied words per copy: a lost, stale or torn copy is seen (up to 2^-64 by chance for random words), a
        permutation of words inside one copy is not.

        Raises:
            ReshardError: a parameter's memory moved since this puller was made, and nothing was copied; or a
                parameter's bytes differ from the source's, and the weights are unusable. Names the parameter.
        """
        self._check_in_place()
        start = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source)
        for tail in self._tails:
            tail.zero_()
        verify_start = time.perf_counter()
        checksum = self._verify()
        end = time.perf_counter()
        return PullResult(
            bytes=self._plan.stats.bytes,
            ops=len(self._pairs) + len(self._tails),
            seconds=end - start,
            verify_seconds=end - verify_start,
            checksum=checksum,
        )

    def _check_in_place(self) -> None:
        for target, (param, place) in zip(self._plan.targets, self._places, strict=True):
            if param.data_ptr() != place:
                raise ReshardError(f"the engine moved parameter {target.name} since the plan was bound; bind it again")

    def _verify(self) -> int:
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


def _check_same_params(plan: Plan, params: Mapping[str, Tensor]) -> None:
    absent = [target.name for target in plan.targets if target.name not in params]
    if absent:
        raise ValueError(f"parameters {', '.join(absent)} are in the plan but not in the module")
    for planned, live in zip(plan.targets, targets_of((t.name, params[t.name]) for t in plan.targets), strict=True):
        if planned != live:
            raise ValueError(f"the plan was made for {planned}, but the module holds {live}; build the plan again")


def _views(op: CopyOp, buffer: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """(target, source) of one copy as [rows, words] views of the widest word that both sides are aligned to."""
    if op.src_offset < 0 or op.src_offset + (op.rows - 1) * op.src_pitch + op.row_bytes > buffer.numel():
        raise ValueError(f"{op} reads past its buffer of {buffer.numel()} bytes")
    strides = (op.src_pitch, op.dst_pitch) if op.rows > 1 else ()
    places = (buffer.data_ptr() + op.src_offset, param.data_ptr() + op.dst_offset)
    word = math.gcd(8, op.row_bytes, *strides, *places)
    return (
        _word_view(param, op.dst_offset, op.dst_pitch, op.rows, op.row_bytes, word),
        _word_view(buffer, op.src_offset, op.src_pitch, op.rows, op.row_bytes, word),
    )


def _word_view(memory: Tensor, offset: int, pitch: int, rows: int, row_bytes: int, word: int) -> Tensor:
    span = (rows - 1) * pitch + row_bytes
    words = memory.narrow(0, offset, span).view(_WORDS[word])
    return words.as_strided((rows, row_bytes // word), (pitch // word, 1))
