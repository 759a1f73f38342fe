"""Loss aggregation: verl's definitions by hand, and sums over any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from mrl.algorithms.aggregation import LOSS_AGG_MODES, LossNorm, aggregate_loss, token_mean

TOKEN_LOSS = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0], [50.0, 50.0, 50.0]])
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Sums 3 and 6 over 2 and 1 tokens; the third sequence has none and does not count.
        ("token-mean", 9 / 3),
        ("token-sum", 9.0),
        ("seq-mean-token-sum", (3 + 6) / 2),
        ("seq-mean-token-mean", (1.5 + 6) / 2),
        ("seq-mean-token-sum-norm", (3 + 6) / 2 / 4),
    ],
)
def test_modes_by_hand(mode: str, expected: float) -> None:
    norm = LossNorm.of(MASK, loss_scale_factor=4)
    assert norm == LossNorm(num_tokens=3, num_sequences=2, loss_scale_factor=4)
    assert aggregate_loss(TOKEN_LOSS, MASK, mode, norm).item() == pytest.approx(expected)


def aggregate_by_loops(token_loss: torch.Tensor, mask: torch.Tensor, mode: str, scale: float) -> float:
    rows = [
        [loss for loss, trained in zip(row, mask_row, strict=True) if trained]
        for row, mask_row in zip(token_loss.tolist(), mask.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    if mode.startswith("token"):
        tokens = [loss for row in rows for loss in row]
        return sum(tokens) / (len(tokens) if mode == "token-mean" else 1)
    divisors = {"seq-mean-token-sum": 1.0, "seq-mean-token-sum-norm": scale}
    return sum(sum(row) / divisors.get(mode, len(row)) for row in rows) / len(rows)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(LOSS_AGG_MODES), padding=st.integers(0, 3))
def test_shares_of_any_split_add_up_in_value_and_gradient(seed: int, mode: str, padding: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    token_loss = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(9, 6, generator=generator) < 0.5
    mask[0, 0] = True
    norm = LossNorm.of(mask, loss_scale_factor=5.0)
    # Each sequence goes to one of four micro-batches, some of which may be empty or without a trained token.
    owner = torch.randint(0, 4, (9,), generator=generator)
    whole, split = token_loss.clone().requires_grad_(), token_loss.clone().requires_grad_()
    loss = aggregate_loss(whole, mask, mode, norm)
    loss.backward()
    shares = []
    for part in range(4):
        part_loss, part_mask = split[owner == part], mask[owner == part]
        padded_loss, padded_mask = pad(part_loss, (0, padding), value=3.0), pad(part_mask, (0, padding))
        shares.append(aggregate_loss(padded_loss, padded_mask, mode, norm))
    sum(shares, torch.zeros(())).backward()
    # float64 throughout; only the order of sums differs.
    assert sum(share.item() for share in shares) == pytest.approx(loss.item(), abs=1e-13)
    assert loss.item() == pytest.approx(aggregate_by_loops(token_loss, mask, mode, 5.0), abs=1e-13)
    assert whole.grad is not None
    torch.testing.assert_close(split.grad, whole.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_mini_batch_without_trained_tokens_has_loss_and_gradient_zero(mode: str) -> None:
    nothing = torch.zeros_like(MASK)
    leaf = TOKEN_LOSS.clone().requires_grad_()
    loss = aggregate_loss(leaf, nothing, mode, LossNorm.of(nothing, loss_scale_factor=4))
    loss.backward()
    assert loss.item() == 0.0
    assert leaf.grad is not None
    assert leaf.grad.count_nonzero() == 0


def test_token_mean_counts_booleans_and_cuts_the_graph() -> None:
    share = token_mean(MASK.roll(1, 1), MASK, LossNorm.of(MASK))
    assert share.item() == pytest.approx(1 / 3)
    assert not token_mean(TOKEN_LOSS.clone().requires_grad_(), MASK, LossNorm.of(MASK)).requires_grad


def test_unknown_mode_and_missing_divisor_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'; choose one of token-mean"):
        aggregate_loss(TOKEN_LOSS, MASK, "mean", LossNorm.of(MASK))
    with pytest.raises(ValueError, match="loss_scale_factor = None; give it a positive constant"):
        aggregate_loss(TOKEN_LOSS, MASK, "seq-mean-token-sum-norm", LossNorm.of(MASK))
