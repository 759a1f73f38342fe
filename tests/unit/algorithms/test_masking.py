"""Masked reductions."""

import pytest
import torch

from mrl.algorithms.masking import (
    compute_means,
    compute_moments,
    compute_moments_and_difference,
    masked_max,
    masked_mean,
    masked_sum,
)

VALUES = torch.tensor([[1.0, torch.nan, 4.0], [torch.inf, 7.0, 2.0]])
MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_reductions_by_hand_ignore_even_nan_and_inf_outside_the_mask() -> None:
    assert masked_sum(VALUES, MASK).item() == 12.0
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [5.0, 7.0]
    assert masked_mean(VALUES, MASK).item() == 4.0
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [2.5, 7.0]
    assert masked_max(VALUES, MASK, empty=0.0).item() == 7.0


def test_empty_mask_gives_zero_and_the_named_floor() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_mean(VALUES, nothing).item() == 0.0
    assert masked_mean(VALUES, nothing, dim=1).tolist() == [0.0, 0.0]
    assert masked_max(VALUES, nothing, empty=-1.0).item() == -1.0


def test_gradient_outside_the_mask_is_zero() -> None:
    leaf = VALUES.clone().requires_grad_()
    masked_mean(leaf, MASK).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, MASK / 3)


def test_moments_by_hand_ignore_even_nan_and_inf_outside_the_mask() -> None:
    found = compute_moments(VALUES - 5, MASK)
    # -4, -1, 2 around -1: (9 + 0 + 9) / 2
    assert (found.count, found.mean, found.mean_square, found.variance) == (3, -1.0, 7.0, 9.0)
    fives = torch.full((2, 3), 5.0)
    assert compute_moments_and_difference(VALUES, fives, MASK)[1:] == (compute_moments(fives, MASK), found)
    assert compute_moments_and_difference(VALUES, fives, MASK)[0] == compute_moments(VALUES, MASK)
    assert compute_means(VALUES - 5, MASK) == (-1.0, 7 / 3)
    nothing = compute_moments(VALUES, torch.zeros_like(MASK))
    assert (nothing.mean, nothing.mean_square, nothing.variance) == (0.0, 0.0, 0.0)
    assert compute_means(VALUES, torch.zeros_like(MASK)) == (0.0, 0.0)


def test_moments_of_many_blocks_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3 + torch.randn(700, 501, generator=generator)
    mask = torch.rand(700, 501, generator=generator) < 0.7
    found, selected = compute_moments(values, mask), values[mask].double()
    # Float64 sums of 250,000 numbers in two orders.
    assert found.mean == pytest.approx(selected.mean().item(), rel=1e-12)
    assert found.variance == pytest.approx(selected.var().item(), rel=1e-9)
    # Rows are summed in float32 there.
    means = selected.mean().item(), selected.abs().mean().item()
    assert compute_means(values, mask) == pytest.approx(means, rel=1e-6)
