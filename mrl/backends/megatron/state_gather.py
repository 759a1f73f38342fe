"""Gathering the distributed optimizer's state for a checkpoint.

Megatron gathers a bucket at a time on the device, and without overlapped reduction one bucket is all of a rank's
parameters: that would take 8 bytes for each of them, beside all that is resident. Here what is gathered stays on the
host, and passes the device in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_ELEMENTS = 1 << 25
"""Of each rank: 128 MiB of float32."""


@contextmanager
def gathered_on_host(optimizers: Iterable[Any], device: torch.device) -> Iterator[None]:
    """While it lasts, megatron's DistributedOptimizers gather their state on the host.

    Args:
        device: whose links it takes.
    """
    original, changed = dist.all_gather, list(optimizers)

    def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None, **options: Any) -> Any:
        if tensor.device.type != "cpu" or tensor.dim() != 1:
            return original(outputs, tensor, group, **options)
        return gather_in_pieces(outputs, tensor, group, device=device)

    for optimizer in changed:
        # Checked and passed on, no more: what takes tensors of the host are the pieces above.
        optimizer.data_parallel_group_gloo = optimizer.data_parallel_group
        optimizer.get_parameter_state_dp_zero = _told_to_use_the_host(optimizer.get_parameter_state_dp_zero)
    dist.all_gather = all_gather  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_gather = original
        for optimizer in changed:
            optimizer.data_parallel_group_gloo = None
            del optimizer.get_parameter_state_dp_zero


def gather_in_pieces(outputs: list[Tensor], tensor: Tensor, group: Any, *, device: torch.device) -> None:
    """Every rank's `tensor` [n] in `outputs`, all on the host; over `device`. Called by all ranks of the group."""
    size = dist.get_world_size(group)
    for first in range(0, tensor.numel(), PIECE_ELEMENTS):
        part = tensor[first : first + PIECE_ELEMENTS].to(device)
        joined = part.new_empty(part.numel() * size)
        dist.all_gather_into_tensor(joined, part, group=group)
        for output, piece in zip(outputs, joined.chunk(size), strict=True):
            output[first : first + piece.numel()].copy_(piece)


def _told_to_use_the_host(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **options: original(**{**options, "use_gloo_comm": True})
