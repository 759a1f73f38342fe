"""Runs a plan: replays its copies into an engine's parameters and compares what arrived with what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from mrl.reshard.aliases import ALIGNMENT_BYTES
from mrl.reshard.cuda_copies import CudaCopies, is_compiled
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute_torch import TorchCopies
from mrl.reshard.layout import SourceRank, targets_of
from mrl.reshard.peer_reads import PIECE_BYTES
from mrl.reshard.peer_sums import PeerSums, Pulled
from mrl.reshard.plan import Plan
from mrl.reshard.transport import open_buffer

BufferKey = tuple[int, int]
"""(trainer rank, index into its buffers)."""


@dataclass(kw_only=True, frozen=True)
class PullResult:
    """What one pull did, within the host."""

    bytes: int
    ops: int
    """Copies and fills."""
    seconds: float
    """Copy and verification."""
    verify_seconds: float
    """Of these, those after the last byte had arrived."""
    checksum: int
    """Of all that arrived, modulo 2^64; equal weights under one plan on one kind of device give equal sums."""
    sums: PeerSums
    """What copy engines moved is verified when `check_peer_sums` has compared these with the other engine ranks'."""


class Copies(Protocol):
    """A plan's operations bound to memory."""

    def pull(self) -> Pulled:
        """Copy, fill, sum, and verify what needs no other engine rank for it; returns when all is done.

        Raises:
            ReshardError: what arrived is not what was sent; names the parameter.
        """
        ...


def open_sources(plan: Plan, sources: Sequence[SourceRank]) -> dict[BufferKey, Tensor]:
    """Open the buffers that the plan copies, serves or sends from or aliases, no others.

    Raises:
        ReshardError: as `open_buffer`.
    """
    by_rank = {source.rank: source for source in sources}
    given = chain.from_iterable(transfer.copies for transfer in (*plan.sends, *plan.serves))
    read = {(op.src_rank, op.src_buffer) for op in chain(plan.host_copies, given)}
    keys = sorted(read | {(alias.src_rank, alias.src_buffer) for alias in plan.aliases})
    return {(rank, index): open_buffer(by_rank[rank].buffers[index]) for rank, index in keys}


def bind_aliases(plan: Plan, buffers: Mapping[BufferKey, Tensor], params: Mapping[str, Tensor]) -> None:
    """Have the plan's aliased parameters be the trainer's memory; what they were is freed with its last tensor.

    Nothing may write them from now on: it would write the trainer's weights.

    Args:
        buffers: of `open_sources`; they must stay mapped while a parameter lies in them.

    Raises:
        ValueError: the parameters are not those the plan was made for, or an address that the engine's kernels may
            not be able to read.
    """
    _check_same_params(plan, params)
    for alias in plan.aliases:
        param = params[alias.dst_param]
        memory = buffers[alias.src_rank, alias.src_buffer].narrow(0, alias.src_offset, alias.num_bytes)
        if memory.data_ptr() % ALIGNMENT_BYTES:
            raise ValueError(
                f"parameter {alias.dst_param} lies at {memory.data_ptr():#x} in the trainer's memory, which "
                f"{ALIGNMENT_BYTES} does not divide; set actor_rollout_ref.rollout.alias_weights=False"
            )
        param.data = memory.view(param.dtype).view(param.shape)


class Puller:
    """A plan bound to memory: what a copy needs is prepared once, each `pull` only copies.

    On CUDA a launch of the compiled kernel and the copy engines; where that cannot be built, and on CPU, torch copies.

    Args:
        buffers: [num_bytes] uint8 of every trainer buffer the plan reads, on the parameters' device; `open_sources`.
        params: the engine rank's live parameters by name.
        piece_bytes: most bytes of one copy by a copy engine, a multiple of 16.

    Raises:
        ValueError: the parameters are not those the plan was made for, or a buffer is missing or too short.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Mapping[BufferKey, Tensor],
        params: Mapping[str, Tensor],
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        _check_same_params(plan, params)
        _check_buffers(plan, buffers)
        names = [target.name for target in plan.targets]
        self._plan = plan
        self._places = [(params[name], params[name].data_ptr()) for name in names]
        flat = {name: params[name].detach().view(-1).view(torch.uint8) for name in names}
        self._copies = _bind(plan, buffers, flat, piece_bytes)

    @torch.no_grad()
    def pull(self) -> PullResult:
        """Overwrite the parameters with the trainer's current weights on this host; returns when the bytes are there.

        The trainer must not write its parameters meanwhile. What arrived is compared with what was sent by checksums:
        a lost, stale or overwritten copy is seen. On CPU these are sums of the words of each copy, taken after it, so
        that a write by the trainer is seen too, but a permutation of words inside one copy is not; on CUDA each word
        counts with its position, and the sent side is what the copy read. What copy engines moved is only summed: it
        is verified when the result's `sums` have been compared with those of the other engine ranks.

        Raises:
            ReshardError: a parameter's memory moved since this puller was made, and nothing was copied; or a
                parameter's bytes differ from the source's, and the weights are unusable. Names the parameter.
        """
        self._check_in_place()
        pulled = self._copies.pull()
        return PullResult(
            bytes=self._plan.stats.bytes - self._plan.stats.remote_bytes,
            ops=len(list(self._plan.host_copies)) + len(self._plan.fills),
            seconds=pulled.seconds,
            verify_seconds=pulled.verify_seconds,
            checksum=pulled.checksum,
            sums=pulled.sums,
        )

    def _check_in_place(self) -> None:
        for target, (param, place) in zip(self._plan.targets, self._places, strict=True):
            if param.data_ptr() != place:
                raise ReshardError(f"the engine moved parameter {target.name} since the plan was bound; bind it again")


def _bind(plan: Plan, buffers: Mapping[BufferKey, Tensor], params: Mapping[str, Tensor], piece_bytes: int) -> Copies:
    on_gpu = next(iter(params.values())).is_cuda and bool(plan.copies or plan.fills or plan.reads or plan.serves)
    if on_gpu and is_compiled():
        return CudaCopies(plan, buffers, params, piece_bytes=piece_bytes)
    return TorchCopies(plan, buffers, params)


def _check_buffers(plan: Plan, buffers: Mapping[BufferKey, Tensor]) -> None:
    served = chain.from_iterable(serve.copies for serve in plan.serves)
    operations = list(chain(plan.host_copies, served))
    missing = sorted({(op.src_rank, op.src_buffer) for op in operations} - set(buffers))
    if missing:
        raise ValueError(f"buffers {missing} (trainer rank, index) are in the plan but were not opened")
    for op in operations:
        size = buffers[op.src_rank, op.src_buffer].numel()
        if op.src_offset < 0 or op.src_offset + (op.rows - 1) * op.src_pitch + op.row_bytes > size:
            raise ValueError(f"{op} reads past its buffer of {size} bytes")


def _check_same_params(plan: Plan, params: Mapping[str, Tensor]) -> None:
    absent = [target.name for target in plan.targets if target.name not in params]
    if absent:
        raise ValueError(f"parameters {', '.join(absent)} are in the plan but not in the module")
    for planned, live in zip(plan.targets, targets_of((t.name, params[t.name]) for t in plan.targets), strict=True):
        if planned != live:
            raise ValueError(f"the plan was made for {planned}, but the module holds {live}; build the plan again")
