"""GAE, whitening, token rewards and explained variance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from mrl.algorithms.advantages import compute_gae, compute_token_rewards, explained_variance, whiten_
from mrl.algorithms.masking import compute_moments_and_difference


def make_case(seed: int = 0, num_samples: int = 6, width: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_samples, width, generator=generator)
    values = torch.randn(num_samples, width, generator=generator)
    return rewards, values, torch.rand(num_samples, width, generator=generator) < 0.6


def gae_by_definition(
    rewards: torch.Tensor, values: torch.Tensor, loss_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 16 as the double sum it is: the advantage at i sums (gamma lam)^(j - i) delta_j over later steps j."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = loss_mask[b].nonzero().flatten().tolist()
        reward = [rewards[b, t].item() for t in steps]
        value = [values[b, t].item() for t in steps] + [0.0]
        deltas = [reward[j] + gamma * value[j + 1] - value[j] for j in range(len(steps))]
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
            returns[b, t] = advantages[b, t] + value[i]
    return advantages, returns


def test_gae_hand_worked_case_steps_over_tool_tokens() -> None:
    # Trained tokens 1, 2, 5; the tool's tokens 3, 4 carry junk. gamma 0.5, lam 0.5, so 0.25 between steps. The second
    # sample is trained everywhere.
    rewards = torch.tensor([[9.0, 0.0, 0.0, 9.0, 9.0, 4.0, 9.0], [0.0] * 7])
    values = torch.tensor([[7.0, 1.0, 2.0, 7.0, 7.0, 3.0, 7.0], [0.0] * 7])
    mask = torch.tensor([[False, True, True, False, False, True, False], [True] * 7])
    advantages, returns = compute_gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # token 5: 4 - 3 = 1; token 2: 0.5 * 3 - 2 + 0.25 * 1 = -0.25; token 1: 0.5 * 2 - 1 + 0.25 * -0.25 = -0.0625
    assert advantages.tolist() == [[0.0, -0.0625, -0.25, 0.0, 0.0, 1.0, 0.0], [0.0] * 7]
    assert returns.tolist() == [[0.0, 0.9375, 1.75, 0.0, 0.0, 4.0, 0.0], [0.0] * 7]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_gae_equals_the_papers_sum(gamma: float, lam: float) -> None:
    rewards, values, mask = make_case()
    mask[2] = False
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    for found, wanted in zip(compute_gae(rewards, values, mask, gamma=gamma, lam=lam), expected, strict=True):
        # Eleven float32 additions of numbers of size up to about 10.
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


def test_gae_with_lam_one_is_return_to_go_minus_value() -> None:
    rewards, values, mask = make_case()
    advantages, returns = compute_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0), rtol=0, atol=5e-6)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0), rtol=0, atol=5e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), front=st.integers(0, 4), back=st.integers(0, 4))
def test_gae_does_not_see_padding_or_other_samples(seed: int, front: int, back: int) -> None:
    rewards, values, mask = make_case(seed)
    whole = compute_gae(rewards, values, mask, gamma=0.97, lam=0.9)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))

    def shuffle_and_pad(tensor: torch.Tensor, fill: float) -> torch.Tensor:
        return pad(tensor[order], (front, back), value=fill)

    padded = compute_gae(
        shuffle_and_pad(rewards, 5.0),
        shuffle_and_pad(values, -3.0),
        shuffle_and_pad(mask, False),
        gamma=0.97,
        lam=0.9,
    )
    width = mask.shape[1]
    for one, other in zip(whole, padded, strict=True):
        assert torch.equal(other[:, front : front + width], one[order])
        assert other[:, :front].count_nonzero() == other[:, front + width :].count_nonzero() == 0


def test_gae_may_write_over_the_rewards() -> None:
    rewards, values, mask = make_case()
    advantages, returns = compute_gae(rewards, values, mask, gamma=0.9, lam=0.8)
    over, same_returns = compute_gae(rewards, values, mask, gamma=0.9, lam=0.8, out=rewards)
    assert over is rewards
    assert torch.equal(over, advantages)
    assert torch.equal(same_returns, returns)


def test_gae_refuses_wrong_shapes_and_discounts() -> None:
    rewards, values, mask = make_case()
    with pytest.raises(ValueError, match=r"rewards \[6, 10\], values \[6, 11\]"):
        compute_gae(rewards[:, 1:], values, mask, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"algorithm\.lam = 1\.5"):
        compute_gae(rewards, values, mask, gamma=1.0, lam=1.5)


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    changed = advantages.clone()
    assert whiten_(changed, mask) is changed
    return changed


def test_whiten_hand_worked_case_uses_the_sample_variance() -> None:
    advantages = torch.tensor([[1.0, 99.0, 3.0], [5.0, -99.0, 99.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4
    assert whiten(advantages, mask).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_whiten_equals_torchs_statistics_of_the_selected_tokens() -> None:
    advantages, _, mask = make_case()
    selected = advantages[mask]
    expected = (selected - selected.mean()) / selected.std(correction=1)
    # 1e-8 beside the variance changes the ninth digit, float32 the seventh.
    torch.testing.assert_close(whiten(advantages, mask)[mask], expected, rtol=0, atol=1e-6)


def test_whiten_is_invariant_to_order_padding_shift_and_scale() -> None:
    advantages, _, mask = make_case()
    whole = whiten(advantages, mask)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    padded = whiten(
        torch.nn.functional.pad(advantages[order], (0, 3), value=50.0), torch.nn.functional.pad(mask, (0, 3))[order]
    )
    torch.testing.assert_close(padded[:, :11], whole[order], rtol=0, atol=1e-7)
    torch.testing.assert_close(whiten(8 * advantages + 16, mask), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_trained", [0, 1, 4])
def test_whiten_without_spread_is_zero_and_finite(num_trained: int) -> None:
    mask = torch.arange(6).reshape(2, 3) < num_trained
    assert whiten(torch.full((2, 3), 0.1), mask).tolist() == [[0.0] * 3] * 2


def test_token_rewards_lie_on_the_last_trained_token() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, True, True], [False, False, False, False]])
    rewards = compute_token_rewards(torch.tensor([2.0, -1.0, 5.0]), mask)
    assert rewards.tolist() == [[0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"scores \[2\]"):
        compute_token_rewards(torch.zeros(2), mask)


def explained_share(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    return explained_variance(*compute_moments_and_difference(returns, values, mask))


def test_explained_variance_by_hand_and_at_its_landmarks() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[0.0, 2.0, 4.0, 77.0]])
    # Errors 0, 1, 2 have variance 1, the returns 4.
    assert explained_share(torch.tensor([[0.0, 1.0, 2.0, -5.0]]), returns, mask) == 0.75
    assert explained_share(returns, returns, mask) == 1.0
    assert explained_share(torch.ones(1, 4), returns, mask) == 0.0
    assert explained_share(-returns, returns, mask) == -3.0
    assert math.isnan(explained_share(returns, torch.ones(1, 4), mask))


def test_returns_that_vary_by_rounding_leave_nothing_to_explain() -> None:
    # Without discount and with equal rewards, returns are advantages + values: the values cancel but for rounding.
    values = torch.tensor([[0.3, -1.7, 2.9, 0.1]])
    returns = (1 - values) + values + torch.tensor([[0.0, 6e-8, -6e-8, 0.0]])
    assert returns.std() > 0
    assert math.isnan(explained_share(values, returns, torch.ones(1, 4, dtype=torch.bool)))


def test_gae_of_long_rows_in_many_blocks_equals_a_loop_over_tokens() -> None:
    # 40 rows of 3000 tokens are two blocks, of 94 pieces each; half of the rows have gaps.
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 40, 3000, generator=generator)
    mask = torch.rand(40, 3000, generator=generator) < 0.8
    starts = torch.randint(0, 2000, (20, 1), generator=generator)
    mask[:20] = (torch.arange(3000) >= starts) & (torch.arange(3000) < starts + 900)
    gamma, lam = 0.999, 0.97
    advantages, returns = compute_gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(40):
        steps = mask[b].nonzero().flatten()
        reward, value = rewards[b, steps].double(), values[b, steps].double()
        expected, after, next_value = torch.zeros_like(value), 0.0, 0.0
        for i in reversed(range(len(steps))):
            after = reward[i] + gamma * next_value - value[i] + gamma * lam * after
            expected[i], next_value = after, value[i]
        # Deltas are made in float32: of numbers up to 5, summed over some 30 tokens.
        torch.testing.assert_close(advantages[b, steps].double(), expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(returns[b, steps].double(), expected + value, rtol=0, atol=5e-6)
        assert advantages[b, ~mask[b]].count_nonzero() == returns[b, ~mask[b]].count_nonzero() == 0
