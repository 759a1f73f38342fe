"""Masked reductions."""

import torch

from mrl.algorithms.masking import masked_max, masked_mean, masked_sum, masked_variance

VALUES = torch.tensor([[1.0, torch.nan, 4.0], [torch.inf, 7.0, 2.0]])
MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_reductions_by_hand_ignore_even_nan_and_inf_outside_the_mask() -> None:
    assert masked_sum(VALUES, MASK).item() == 12.0
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [5.0, 7.0]
    assert masked_mean(VALUES, MASK).item() == 4.0
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [2.5, 7.0]
    # 1, 4, 7 around 4: (9 + 0 + 9) / 2
    assert masked_variance(VALUES, MASK).item() == 9.0
    assert masked_max(VALUES, MASK, empty=0.0).item() == 7.0


def test_empty_mask_gives_zero_and_the_named_floor() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_mean(VALUES, nothing).item() == 0.0
    assert masked_mean(VALUES, nothing, dim=1).tolist() == [0.0, 0.0]
    assert masked_variance(VALUES, nothing).item() == 0.0
    assert masked_max(VALUES, nothing, empty=-1.0).item() == -1.0


def test_gradient_outside_the_mask_is_zero() -> None:
    leaf = VALUES.clone().requires_grad_()
    masked_mean(leaf, MASK).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, MASK / 3)
