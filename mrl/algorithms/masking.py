"""Sums, means and variances over the tokens of a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming every shape, unless all tensors have the same one."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; all must be [B, T]")


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is True, over `dim` or everything; what lies outside, even NaN, is ignored."""
    selected = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return selected.sum() if dim is None else selected.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is True, over `dim` or everything; 0 where the mask selects nothing."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Sample variance (divisor n - 1) of `values` where `mask` is True; 0 for fewer than two values."""
    squares = (values - masked_mean(values, mask)).square()
    return masked_sum(squares, mask) / (mask.sum() - 1).clamp(min=1)


def masked_max(values: Tensor, mask: Tensor, *, empty: float) -> Tensor:
    """Largest of `values` where `mask` is True, at least `empty`, which is also the result for an empty mask."""
    floor = torch.full((), empty, dtype=values.dtype, device=values.device)
    return torch.where(mask, values, floor).max()
