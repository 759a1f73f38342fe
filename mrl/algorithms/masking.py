"""Sums, means and variances over the tokens of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.blocks import count_rows, selected, sum_blocks


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


@dataclass(frozen=True)
class Moments:
    """Of the values that a mask selects; sums in float64."""

    count: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """0 of no values."""
        return self.total / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        """0 of no values."""
        return self.squares / max(self.count, 1)

    @property
    def variance(self) -> float:
        """Sample variance (divisor n - 1), never negative; 0 for fewer than two values."""
        return max(self.squares - self.count * self.mean**2, 0.0) / max(self.count - 1, 1)


@torch.no_grad()
def compute_moments(values: Tensor, mask: Tensor) -> Moments:
    """Moments of `values` where `mask` is True, in one pass over a whole batch.

    Args:
        values: [B, T] float32.
        mask: [B, T] bool.
    """

    def sums(mask: Tensor, values: Tensor) -> list[Tensor]:
        return [count_rows(mask).sum(), *_sums(selected(values, mask).double())]

    count, total, squares = sum_blocks(sums, mask, values)
    return Moments(int(count), total, squares)


@torch.no_grad()
def compute_moments_and_difference(values: Tensor, others: Tensor, mask: Tensor) -> tuple[Moments, Moments, Moments]:
    """Moments of `values`, of `others` and of `values - others` where `mask` is True, in one pass over a whole batch.

    Args:
        values, others: [B, T] float32.
        mask: [B, T] bool.
    """

    def sums(mask: Tensor, values: Tensor, others: Tensor) -> list[Tensor]:
        values, others = selected(values, mask).double(), selected(others, mask).double()
        found = [count_rows(mask).sum(), *_sums(values), *_sums(others)]
        return found + _sums(values.sub_(others))

    count, *found = sum_blocks(sums, mask, values, others)
    first, second, third = (Moments(int(count), *found[place : place + 2]) for place in (0, 2, 4))
    return first, second, third


@torch.no_grad()
def compute_means(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Means of `values` and of their magnitudes where `mask` is True, over a whole batch [B, T]; 0 of none."""

    def sums(mask: Tensor, values: Tensor) -> list[Tensor]:
        own = selected(values, mask)
        total = own.sum(1).double().sum()
        return [count_rows(mask).sum(), total, own.abs_().sum(1).double().sum()]

    count, total, magnitudes = sum_blocks(sums, mask, values)
    return total / max(count, 1), magnitudes / max(count, 1)


def _sums(exact: Tensor) -> list[Tensor]:
    """Of the values and of their squares."""
    flat = exact.flatten()
    return [flat.sum(), torch.dot(flat, flat)]
