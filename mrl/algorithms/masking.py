"""Sums, means and variances over the tokens of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.blocks import sum_blocks


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
    count = mask.count_nonzero(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_max(values: Tensor, mask: Tensor, *, empty: float) -> Tensor:
    """Largest of `values` where `mask` is True, at least `empty`, which is also the result for an empty mask."""
    floor = torch.full((), empty, dtype=values.dtype, device=values.device)
    return torch.where(mask, values, floor).max()


@dataclass(kw_only=True, frozen=True)
class Moments:
    """Of the values that a mask selects; sums in float64."""

    count: int
    total: float
    magnitudes: float
    """Sum of absolute values."""
    squares: float

    @property
    def mean(self) -> float:
        """0 of no values."""
        return self.total / max(self.count, 1)

    @property
    def mean_magnitude(self) -> float:
        """0 of no values."""
        return self.magnitudes / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        """0 of no values."""
        return self.squares / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Sample variance (divisor n - 1), never negative; 0 for fewer than two values."""
        return max(self.squares - self.count * self.mean**2, 0.0) / max(self.count - 1, 1)


@torch.no_grad()
def compute_moments(values: Tensor, mask: Tensor, *, minus: Tensor | None = None) -> Moments:
    """Moments of `values`, or of `values - minus`, where `mask` is True, in one pass over a whole batch.

    Args:
        values, minus: [B, T] float32.
        mask: [B, T] bool.
    """

    def sums(mask: Tensor, values: Tensor, minus: Tensor | None = None) -> list[Tensor]:
        exact = values.double() if minus is None else values.double() - minus
        selected = torch.where(mask, exact, 0.0).flatten()
        return [mask.count_nonzero(), selected.sum(), selected.abs().sum(), torch.dot(selected, selected)]

    tensors = [mask, values] if minus is None else [mask, values, minus]
    count, total, magnitudes, squares = sum_blocks(sums, *tensors)
    return Moments(count=int(count), total=total, magnitudes=magnitudes, squares=squares)
