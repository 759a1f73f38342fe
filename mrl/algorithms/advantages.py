"""Advantages and returns from per-token rewards and values."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mrl.algorithms.blocks import count_rows, row_blocks, selected
from mrl.algorithms.masking import Moments, compute_moments, require_same_shape

_SCAN_WIDTH = 16
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
    places = torch.arange(1, loss_mask.shape[1] + 1, dtype=torch.int32, device=loss_mask.device)
    for rows in row_blocks(loss_mask.shape):
        last = (loss_mask[rows].view(torch.uint8) * places).amax(1).long()
        samples = last.nonzero().flatten()
        rewards[rows][samples, last[samples] - 1] = scores[rows][samples].float()
    return rewards


@torch.no_grad()
def compute_gae(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, lam: float, out: Tensor | None = None
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
        out: takes the advantages; may be `rewards`, where they are not needed any more.

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
    advantages, returns = torch.empty_like(values) if out is None else out, torch.empty_like(values)
    for rows in row_blocks(values.shape):
        mask = loss_mask[rows]
        estimate = _gae_of_runs if _are_runs(mask) else _gae_over_gaps
        exact = estimate(rewards[rows], values[rows], mask, gamma=gamma, decay=gamma * lam)
        advantages[rows] = selected(exact.to(values.dtype), mask)
        returns[rows] = selected(exact.add_(values[rows]).to(values.dtype), mask)
    return advantages, returns


@torch.no_grad()
def whiten_(advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """Shift and scale advantages, in place, to mean 0 and variance 1 over the trained tokens of the batch.

    The statistics are those of all rows given: with the global batch on every rank the result is the same for any
    data-parallel size. The variance is the sample variance (divisor n - 1), 1e-8 is added to it as verl does, and sums
    run in float64. A batch with fewer than two trained tokens, or with equal advantages, becomes zero.

    Args:
        advantages: [B, T] float32.
        loss_mask: [B, T] bool.

    Returns:
        `advantages`, zero where the mask is False.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(advantages=advantages, loss_mask=loss_mask)
    moments = compute_moments(advantages, loss_mask)
    scale = (moments.variance + 1e-8) ** -0.5
    for rows in row_blocks(advantages.shape):
        exact = advantages[rows].double().sub_(moments.mean).mul_(scale)
        advantages[rows] = selected(exact.to(advantages.dtype), loss_mask[rows])
    return advantages


def explained_variance(returns: Moments, values: Moments, difference: Moments) -> float:
    """Share of the variance of the returns that the values explain: 1 - Var[returns - values] / Var[returns].

    Args:
        difference: of returns - values, like the others over the trained tokens of a batch.

    Returns:
        At most 1; NaN when the returns vary by no more than float32 rounding of the values in them: nothing is left to
        explain.
    """
    rounding = 1e-6**2 * values.mean_square
    if returns.variance <= rounding:
        return math.nan
    return 1 - difference.variance / returns.variance


def _are_runs(mask: Tensor) -> bool:
    """Whether the trained tokens of each row are adjacent."""
    flags = mask.view(torch.uint8)
    starts = count_rows(flags[:, 1:] > flags[:, :-1]) + flags[:, 0]
    return bool((starts <= 1).all())


def _gae_of_runs(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, decay: float) -> Tensor:
    """[b, t] float64 advantages of rows whose trained tokens are adjacent; arbitrary where the mask is False."""
    value = selected(values, mask)
    delta = selected(rewards, mask).sub_(value)
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

    Within pieces of `_SCAN_WIDTH` tokens as a product with a triangular matrix, and of the pieces' own sums likewise: a
    loop over tokens would need a transposed copy of every tensor. In float64, so that the result, rounded to float32,
    does not show where pieces begin.
    """
    width = terms.shape[1]
    if width <= _SCAN_WIDTH:
        return terms @ _decay_matrix(width, decay)
    if width % _SCAN_WIDTH:
        terms = torch.nn.functional.pad(terms, (0, -width % _SCAN_WIDTH))
    within = terms.unflatten(1, (-1, _SCAN_WIDTH)) @ _decay_matrix(_SCAN_WIDTH, decay)
    behind = _decayed_sums(within[:, 1:, 0], decay**_SCAN_WIDTH)
    # decay^16, ..., decay^1
    powers = _decay_matrix(_SCAN_WIDTH + 1, decay)[-1, :-1]
    within[:, :-1].addcmul_(behind.unsqueeze(2), powers)
    return within.flatten(1)[:, :width]


@functools.lru_cache(maxsize=32)
def _decay_matrix(size: int, decay: float) -> Tensor:
    """[s, t] float64: decay^(s - t) for s >= t, else 0."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    return (torch.tensor(decay, dtype=torch.float64) ** distance.clamp(min=0)).tril()
