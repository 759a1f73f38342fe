"""The distributed optimizer's state for a checkpoint: each parameter's on one of the ranks that share it.

Every rank holds a slice of the buffer in which all parameters lie one after the other, so a parameter's state has to be
put together before it can be named. Megatron does that for all parameters on every rank: 20 bytes for each of them at
the peak, as many times as a host has ranks. Here every rank puts together its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

PIECE_ELEMENTS = 1 << 28
"""Of all ranks together: 1 GiB of float32 on each device."""

Range = tuple[int, int]
"""First element, and the one after the last."""


@contextmanager
def state_shared_out(optimizers: Iterable[Any], device: torch.device) -> Iterator[None]:
    """While it lasts, the sharded states of megatron's DistributedOptimizers have each parameter on one rank.

    Args:
        device: over whose links the ranks' slices come; what has come lies on the host.
    """
    changed = list(optimizers)
    for optimizer in changed:
        optimizer.get_parameter_state_dp_zero = partial(_gather_owned, optimizer, device)
        optimizer.sharded_param_state_fully_reshardable = partial(_owned_entries, optimizer)
    try:
        yield
    finally:
        for optimizer in changed:
            del optimizer.get_parameter_state_dp_zero, optimizer.sharded_param_state_fully_reshardable


def share_out(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each parameter, by their numbers of elements: in order, the one that has least so far."""
    held, owners = [0] * num_ranks, []
    for size in sizes:
        owner = held.index(min(held))
        held[owner] += size
        owners.append(owner)
    return owners


def _param_ranges(optimizer: Any) -> list[list[Range]]:
    """Of every buffer, where its parameters lie, in megatron's order."""
    return [[(first, end) for first, end, _ in buffer.param_index_map.values()] for buffer in optimizer.buffers]


def _owned(optimizer: Any) -> list[list[bool]]:
    """Of every buffer, whether this rank has each of its parameters."""
    ranges, group = _param_ranges(optimizer), optimizer.data_parallel_group
    owners = iter(share_out([end - first for each in ranges for first, end in each], group.size()))
    return [[next(owners) == group.rank() for _ in each] for each in ranges]


def _gather_owned(optimizer: Any, device: torch.device, **_: Any) -> dict[Any, Any]:
    """As megatron's own, on every rank, but for parameters of other ranks: their zeros take no memory."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    owned = _owned(optimizer)
    for number, (buffer, ranges) in enumerate(zip(optimizer.buffers, _param_ranges(optimizer), strict=True)):
        wanted = [each for each, mine in zip(ranges, owned[number], strict=True) if mine]
        ((dtype, buckets),) = optimizer.gbuf_ranges[number].items()
        whole: dict[str, Any] = {
            key: _untouched_zeros(buffer.numel_unpadded) for key in ("param", *optimizer.optimizer_state_keys)
        }
        for key, target in whole.items():
            begin = 0
            for bucket, slices in zip(buffer.buckets, buckets, strict=True):
                mine = _own_slice(optimizer, bucket, slices["param_map"], key)
                gather_ranges(target, mine, wanted, begin, optimizer.data_parallel_group, device=device)
                begin += bucket.numel_unpadded
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _untouched_zeros(length: int) -> Tensor:
    """[length] float32 zeros of the system, which take memory where something is written; torch writes its own."""
    return torch.from_numpy(np.zeros(length, dtype=np.float32))


def _own_slice(optimizer: Any, bucket: Any, params: dict[Any, Any], key: str) -> Tensor:
    """This rank's slice of a bucket, on the host."""
    mine = torch.zeros(bucket.grad_data.numel() // optimizer.data_parallel_group.size())
    for param, where in params.items():
        place = where["gbuf_local"]
        mine[place.start : place.end].copy_(optimizer._get_main_param_and_optimizer_states(param)[key].detach())
    return mine


def gather_ranges(
    target: Tensor, mine: Tensor, wanted: Sequence[Range], begin: int, group: Any, *, device: torch.device
) -> None:
    """Fill the wanted ranges of `target` from all ranks' slices, in pieces over `device`. Called by all ranks of group.

    Args:
        target: [buffer] on the host.
        mine: [n] on the host, this rank's slice of a bucket: elements begin + rank * n onwards of the buffer.
        wanted: ranges of the buffer; they may reach beyond the bucket.
    """
    size, length = group.size(), mine.numel()
    step = max(1, PIECE_ELEMENTS // size)
    for first in range(0, length, step):
        part = mine[first : first + step].to(device)
        joined = part.new_empty(part.numel() * size)
        dist.all_gather_into_tensor(joined, part, group=group)
        for rank, piece in enumerate(joined.chunk(size)):
            start = begin + rank * length + first
            for low, high in wanted:
                low, high = max(low, start), min(high, start + piece.numel(), target.numel())
                if low < high:
                    target[low:high].copy_(piece[low - start : high - start])


def _owned_entries(optimizer: Any, *args: Any, **options: Any) -> dict[int, dict[str, Any]]:
    """Megatron's own entries of the parameters that this rank has."""
    entries = type(optimizer).sharded_param_state_fully_reshardable(optimizer, *args, **options)
    mine = [each for buffer in _owned(optimizer) for each in buffer]
    return {
        number: {key: _only_copy(optimizer, tensor) for key, tensor in tensors.items()}
        for number, tensors in entries.items()
        if mine[number]
    }


def _only_copy(optimizer: Any, tensor: Any) -> Any:
    """The same, told to be the first of its data-parallel replicas: there are no others."""
    *others, replica = tensor.replica_id
    assert replica == optimizer.data_parallel_group.rank(), tensor.replica_id
    return replace(tensor, replica_id=(*others, 0))
