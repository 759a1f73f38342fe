"""A step's whole batch on the CPU, in blocks of rows that fit a core's cache.

A temporary as large as the batch costs more, in pages and in memory traffic, than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**16
"""Of one tensor and for each thread that shares the work: 256 KiB of float32."""


def row_blocks(shape: torch.Size) -> Iterator[slice]:
    """Slices of the rows of [B, T], in order, each of about as many elements as a cache holds."""
    rows = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // max(1, shape[1]))
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def sum_blocks(function: Callable[..., list[Tensor]], *tensors: Tensor) -> list[float]:
    """The sums, in float64, of the scalars that `function` returns for each block of rows of `tensors` [B, T]."""
    total: Tensor | None = None
    for rows in row_blocks(tensors[0].shape):
        scalars = torch.stack([scalar.double() for scalar in function(*(tensor[rows] for tensor in tensors))])
        total = scalars if total is None else total + scalars
    return [] if total is None else total.tolist()


def map_blocks(function: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `function` returns for each block of rows of `tensors` [B, T], as one tensor [B, T]."""
    result = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
    for rows in row_blocks(result.shape):
        result[rows] = function(*(tensor[rows] for tensor in tensors))
    return result
