"""Advantages and returns from per-token rewards and values."""

from __future__ import annotations

import torch
from torch import Tensor

from mrl.algorithms.masking import masked_mean, masked_variance, require_same_shape


def compute_token_rewards(scores: Tensor, loss_mask: Tensor) -> Tensor:
    """Per-token rewards that give each sample's score to its last trained token.

    Args:
        scores: [B] float32, one per sample.
        loss_mask: [B, T] bool.

    Returns:
        [B, T] float32. A sample without a trained token has no place for its score: its row is zero.

    Raises:
        ValueError: scores is not [B].
    """
    if scores.shape != loss_mask.shape[:1]:
        raise ValueError(
            f"scores {list(scores.shape)} must have one entry per row of loss_mask {list(loss_mask.shape)}"
        )
    trained_after = loss_mask.flip(1).cumsum(1).flip(1)
    is_last = loss_mask & (trained_after == 1)
    return torch.where(is_last, scores[:, None].float(), 0.0)


@torch.no_grad()
def compute_gae(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates over response tokens.

    Masked tokens (prompts, tool output, padding) are stepped over: the recursion joins each trained token to the next
    trained one of its sample, as if the tokens between did not exist, and their rewards do not count. After the last
    trained token the episode ends with value 0. Advantages are not whitened.

    Args:
        rewards: [B, T] float32, per token, KL penalty already subtracted.
        values: [B, T] float32, critic output before this update.
        loss_mask: [B, T] bool.
        gamma, lam: per-token discounts in [0, 1].

    Returns:
        advantages, returns: [B, T] float32, zero where the mask is False. Returns are advantages + values.

    Raises:
        ValueError: shapes differ, or a discount lies outside [0, 1].

    Source: Schulman et al., arXiv:1506.02438, eq. 16.
    """
    require_same_shape(rewards=rewards, values=values, loss_mask=loss_mask)
    for name, discount in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"algorithm.{name} = {discount} must lie in [0, 1]")
    # Time first: the loop then reads contiguous rows.
    rewards_tb, values_tb, mask_tb = (tensor.t().contiguous() for tensor in (rewards, values, loss_mask))
    advantages_tb = torch.zeros_like(values_tb)
    next_value = values_tb.new_zeros(values.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(mask_tb.any(1).nonzero().flatten().tolist()):
        delta = rewards_tb[t] + gamma * next_value - values_tb[t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask_tb[t], values_tb[t], next_value)
        next_advantage = torch.where(mask_tb[t], advantage, next_advantage)
        advantages_tb[t] = torch.where(mask_tb[t], advantage, 0.0)
    advantages = advantages_tb.t().contiguous()
    return advantages, torch.where(loss_mask, advantages + values, 0.0)


@torch.no_grad()
def whiten(advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """Advantages shifted and scaled to mean 0 and variance 1 over the trained tokens of the batch.

    The statistics are those of all rows given: with the global batch on every rank the result is the same for any
    data-parallel size. The variance is the sample variance (divisor n - 1), 1e-8 is added to it as verl does, and sums
    run in float64. A batch with fewer than two trained tokens, or with equal advantages, becomes zero.

    Args:
        advantages: [B, T] float32.
        loss_mask: [B, T] bool.

    Returns:
        [B, T], same dtype, zero where the mask is False.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(advantages=advantages, loss_mask=loss_mask)
    exact = advantages.double()
    centered = exact - masked_mean(exact, loss_mask)
    scaled = centered * torch.rsqrt(masked_variance(exact, loss_mask) + 1e-8)
    return torch.where(loss_mask, scaled, 0.0).to(advantages.dtype)


@torch.no_grad()
def compute_explained_variance(values: Tensor, returns: Tensor, loss_mask: Tensor) -> Tensor:
    """Share of the variance of the returns that the values explain: 1 - Var[returns - values] / Var[returns].

    Args:
        values, returns: [B, T] float32.
        loss_mask: [B, T] bool.

    Returns:
        Scalar float32, at most 1; NaN when the returns vary by no more than float32 rounding of the values in them:
        nothing is left to explain.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(values=values, returns=returns, loss_mask=loss_mask)
    target = returns.double()
    total = masked_variance(target, loss_mask)
    unexplained = masked_variance(target - values.double(), loss_mask)
    rounding = (1e-6**2) * masked_mean(values.double() ** 2, loss_mask)
    return torch.where(total > rounding, 1 - unexplained / total, torch.nan).float()
