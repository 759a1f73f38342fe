"""Statistics of vocabulary columns and the gradient through them, with torch operations.

Sums run in float32 (float64 for float64 logits), a slice of tokens at a time, so no full-precision copy of all logits
exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

_SLICE_ELEMENTS = 1 << 24
"""Logits handled at once: 64 MiB in float32."""


def statistics(
    logits: Tensor, targets: Tensor, *, count: int, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Of the first `count` columns, per token: their peak, and three sums of x = (logit - peak) / temperature.

    Args:
        logits: [..., t, W], floating point, finite.
        targets: [..., t] int64, a column, or -1 where none is to be looked up.
        count: in [0, W]; later columns take no part.

    Returns:
        peak: [..., t] float32, of the logits as they are; -inf where count is 0.
        sums: [3, ..., t] float32: of exp(x), of exp(x) x if asked for, else 0, and the target's x, 0 where it has none.
    """
    dtype = _sum_dtype(logits)
    peak = torch.full(targets.shape, -torch.inf, dtype=dtype, device=logits.device)
    sums = torch.zeros((3, *targets.shape), dtype=dtype, device=logits.device)
    if count == 0:
        return peak, sums
    for start, size in _slices(logits):
        offsets = logits.narrow(-2, start, size)[..., :count].to(dtype, copy=True)
        part = offsets.amax(-1, keepdim=True)
        offsets.sub_(part).div_(temperature)
        column = _cut(targets, start, size)
        peak.narrow(-1, start, size).copy_(part.squeeze(-1))
        sum_exp, weighted, target = sums.narrow(-1, start, size).unbind()
        target.copy_(offsets.gather(-1, column.clamp(min=0)).masked_fill_(column < 0, 0.0).squeeze(-1))
        if with_entropy:
            exp = offsets.exp()
            sum_exp.copy_(exp.sum(-1))
            weighted.copy_(exp.mul_(offsets).sum(-1))
        else:
            sum_exp.copy_(offsets.exp_().sum(-1))
    return peak, sums


def gradient(
    logits: Tensor,
    targets: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    grad_log_probs: Tensor,
    entropy_terms: tuple[Tensor, Tensor] | None,
    *,
    count: int,
    temperature: float,
    inplace: bool,
) -> Tensor:
    """Gradient with respect to these columns' logits, from that of log-probs and entropy over all columns.

    Args:
        logits, targets, count, temperature: as in `statistics`.
        peak: [..., t] float32, of all columns' logits.
        log_sum: [..., t] float32, log of all columns' sum of exp(x).
        grad_log_probs: [..., t] float32.
        entropy_terms: gradient of the entropy and the entropy, [..., t] float32 each.
        inplace: overwrite the logits. Autograd is told, so that whoever needs them later gets its error.

    Returns:
        Shape and dtype of the logits, and their memory if `inplace`; 0 from column `count` on.
    """
    grad = logits.detach() if inplace else torch.empty_like(logits)
    is_here = targets >= 0
    for start, size in _slices(logits) if count else ():
        cut = partial(_cut, start=start, size=size)
        log_softmax = logits.narrow(-2, start, size)[..., :count].to(_sum_dtype(logits), copy=True)
        log_softmax.sub_(cut(peak)).div_(temperature).sub_(cut(log_sum))
        weight = cut(grad_log_probs)
        if entropy_terms is None:
            part = log_softmax.exp_().mul_(-weight)
        else:
            grad_entropy, entropy = map(cut, entropy_terms)
            softmax = log_softmax.exp()
            part = log_softmax.add_(entropy).mul_(grad_entropy).add_(weight).neg_().mul_(softmax)
        part.scatter_add_(-1, cut(targets).clamp(min=0), (weight * cut(is_here)).to(part.dtype))
        grad.narrow(-2, start, size)[..., :count] = part.div_(temperature)
    grad[..., count:].zero_()
    return grad


def _slices(logits: Tensor) -> Iterator[tuple[int, int]]:
    """(start, size) pairs that cut the token dim, so that each slice has few elements."""
    num_tokens = logits.shape[-2]
    per_token = max(logits.numel() // max(num_tokens, 1), 1)
    step = max(_SLICE_ELEMENTS // per_token, 1)
    for start in range(0, num_tokens, step):
        yield start, min(step, num_tokens - start)


def _cut(per_token: Tensor, start: int, size: int) -> Tensor:
    """A slice of a per-token tensor, with a vocabulary dim of 1 added."""
    return per_token.narrow(-1, start, size).unsqueeze(-1)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
