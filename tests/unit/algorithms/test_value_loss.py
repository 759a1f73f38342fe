"""The clipped value loss."""

import pytest
import torch

from mrl.algorithms.value_loss import compute_value_loss


def test_every_region_by_hand() -> None:
    # Old value 1, range 0.5, so the value counts as at most 1.5 and at least 0.5.
    cases = [
        # value, return, loss, gradient (value - return, or 0 where clipped), clipped
        (1.2, 2.0, 0.32, -0.8, False),  # inside the range
        (1.9, 2.0, 0.125, 0.0, True),  # moved too far towards the return: error 0.5 instead of 0.1
        (1.9, 1.0, 0.405, 0.9, False),  # moved too far away from it: pulled back with the whole error
        (0.1, 0.0, 0.125, 0.0, True),
        (0.1, 2.0, 1.805, -1.9, False),
    ]
    values, returns, losses, gradients, clipped = (list(column) for column in zip(*cases, strict=True))
    leaf = torch.tensor([values], requires_grad=True)
    result = compute_value_loss(leaf, torch.ones(1, 5), torch.tensor([returns]), cliprange_value=0.5)
    result.token_loss.sum().backward()
    assert result.token_loss[0].tolist() == pytest.approx(losses, abs=1e-6)
    assert leaf.grad is not None
    assert leaf.grad[0].tolist() == pytest.approx(gradients, abs=1e-6)
    assert result.clipped[0].tolist() == clipped


def test_equals_a_loop_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    result = compute_value_loss(values, old_values, returns, cliprange_value=0.3)
    for b in range(5):
        for t in range(7):
            value, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            bounded = min(max(value, old - 0.3), old + 0.3)
            expected = max((value - target) ** 2, (bounded - target) ** 2) / 2
            assert result.token_loss[b, t].item() == pytest.approx(expected, abs=1e-14)


def test_a_large_range_is_the_plain_squared_error() -> None:
    generator = torch.Generator().manual_seed(1)
    values, old_values, returns = torch.randn(3, 5, 7, generator=generator)
    result = compute_value_loss(values, old_values, returns, cliprange_value=1e6)
    # old + (value - old) rounds once more than value itself.
    torch.testing.assert_close(2 * result.token_loss, (values - returns).square(), rtol=0, atol=5e-6)


def test_range_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"critic\.cliprange_value = 0\.0"):
        compute_value_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), cliprange_value=0.0)
