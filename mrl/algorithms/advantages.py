"""Advantages and returns from per-token rewards and values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mrl.algorithms.blocks import map_blocks, row_blocks
from mrl.algorithms.masking import compute_moments, require_same_shape

_SCAN_WIDTH = 32
"""Tokens whose recursion is one matrix product."""


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
    rewards = torch.zeros(loss_mask.shape, dtype=torch.float32, device=loss_mask.device)
    samples = loss_mask.any(1).nonzero().flatten()
    last = loss_mask.shape[1] - 1 - loss_mask.flip(1).view(torch.uint8).argmax(1)
    rewards[samples, last[samples]] = scores[samples].float()
    return rewards


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
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    for rows in row_blocks(values.shape):
        mask = loss_mask[rows]
        estimate = _gae_of_runs if _are_runs(mask) else _gae_over_gaps
        exact = estimate(rewards[rows], values[rows], mask, gamma=gamma, decay=gamma * lam)
        advantages[rows] = torch.where(mask, exact, 0.0)
        returns[rows] = torch.where(mask, exact + values[rows], 0.0)
    return advantages, returns


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
    moments = compute_moments(advantages, loss_mask)
    scale = (moments.variance + 1e-8) ** -0.5

    def scaled(advantages: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, (advantages.double() - moments.mean) * scale, 0.0)

    return map_blocks(scaled, advantages, loss_mask)


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
    total = compute_moments(returns, loss_mask).variance
    rounding = 1e-6**2 * compute_moments(values, loss_mask).mean_square
    if total <= rounding:
        return torch.tensor(torch.nan)
    unexplained = compute_moments(returns, loss_mask, minus=values).variance
    return torch.tensor(1 - unexplained / total, dtype=torch.float32)


def _are_runs(mask: Tensor) -> bool:
    """Whether the trained tokens of each row are adjacent."""
    flags = mask.view(torch.uint8)
    starts = (flags[:, 1:] > flags[:, :-1]).sum(1) + flags[:, 0]
    return bool((starts <= 1).all())


def _gae_of_runs(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, decay: float) -> Tensor:
    """[b, t] float64 advantages of rows whose trained tokens are adjacent; arbitrary where the mask is False."""
    value = torch.where(mask, values, 0.0)
    delta = torch.where(mask, rewards, 0.0).sub_(value)
    delta[:, :-1].add_(value[:, 1:], alpha=gamma)
    # A token before the run would be given the value of its first token; its own advantage is dropped, and no other's
    # depends on it.
    return _decayed_sums(delta.double(), decay)


def _gae_over_gaps(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, decay: float) -> Tensor:
    """As `_gae_of_runs`, of any rows: their trained tokens are moved together and back."""
    rows, columns = mask.nonzero(as_tuple=True)
    places = mask.cumsum(1)[rows, columns] - 1

    def join(tensor: Tensor) -> Tensor:
        joined = torch.zeros_like(tensor)
        joined[rows, places] = tensor[rows, columns]
        return joined

    joined = _gae_of_runs(join(rewards), join(values), join(mask), gamma=gamma, decay=decay)
    exact = torch.zeros_like(joined)
    exact[rows, columns] = joined[rows, places]
    return exact


def _decayed_sums(terms: Tensor, decay: float) -> Tensor:
    """Entry t is the sum over s >= t of decay^(s - t) terms[s]. [b, t] float64.

    Within pieces of `_SCAN_WIDTH` tokens, and from piece to piece, as a product with a triangular matrix: a loop over
    tokens would need a transposed copy of every tensor. In float64, so that the result, rounded to float32, does not
    show where pieces begin.
    """
    width = terms.shape[1]
    pieces = torch.nn.functional.pad(terms, (0, -width % _SCAN_WIDTH)).unflatten(1, (-1, _SCAN_WIDTH))
    within = pieces @ _decay_matrix(_SCAN_WIDTH, decay)
    behind = within[:, 1:, 0] @ _decay_matrix(within.shape[1] - 1, decay**_SCAN_WIDTH)
    powers = torch.tensor(decay, dtype=torch.float64) ** torch.arange(_SCAN_WIDTH, 0, -1)
    within[:, :-1].addcmul_(behind.unsqueeze(2), powers)
    return within.flatten(1)[:, :width]


@functools.lru_cache(maxsize=8)
def _decay_matrix(size: int, decay: float) -> Tensor:
    """[s, t] float64: decay^(s - t) for s >= t, else 0."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    return (torch.tensor(decay, dtype=torch.float64) ** distance.clamp(min=0)).tril()
