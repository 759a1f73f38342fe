"""Log-probs and entropy of logits whose vocabulary is split over a tensor-parallel group.

Layout: rank r of the group holds columns [r * V/tp, (r + 1) * V/tp) of the padded vocabulary. Columns at or above
`vocab_size` are padding and take no part. All sums run in float32 (float64 for float64 logits), a slice of tokens at a
time, so no full-precision copy of all logits exists; inputs are never written to.

Every function is called by all of `tp_group` with the same shapes and targets, and its result is the same on all of
it. Each rank's backward gives the gradient of its own columns, without communication, and expects all ranks to
compute the same loss from the result, as tensor-parallel ranks do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_SLICE_ELEMENTS = 1 << 24
"""Logits handled at once: 64 MiB in float32."""


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-prob of each target under softmax(logits / temperature).

    Args:
        logits: [b, t, V/tp] or [N, V/tp], floating point, finite.
        targets: [b, t] or [N] int64, global vocabulary indices.
        tp_group: holders of the vocabulary's shards; None for one rank with the whole.
        vocab_size: V without padding.
        temperature: that of sampling, positive.

    Returns:
        [b, t] or [N], float32. NaN where a target lies outside [0, vocab_size): checking on the host would stall the
        GPU.

    Raises:
        ValueError: shapes do not fit, vocab_size exceeds the shards, or temperature is not positive.
    """
    columns = _Columns.of(logits, tp_group, vocab_size)
    _check(logits, targets, temperature)
    return _VocabParallel.apply(logits, targets, columns, temperature, False)[0]


def vocab_parallel_entropy(
    logits: Tensor, *, tp_group: dist.ProcessGroup | None, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """Entropy, in nats, of softmax(logits / temperature): [b, t] or [N] float32.

    Arguments and errors as in `vocab_parallel_log_probs`.
    """
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    columns = _Columns.of(logits, tp_group, vocab_size)
    _check(logits, targets, temperature)
    return _VocabParallel.apply(logits, targets, columns, temperature, True)[1]


def vocab_parallel_log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Both of the above from one pass over the logits, with one pass back. Arguments and errors as above."""
    columns = _Columns.of(logits, tp_group, vocab_size)
    _check(logits, targets, temperature)
    return _VocabParallel.apply(logits, targets, columns, temperature, True)


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} must be those of targets {list(targets.shape)} with a vocabulary dim added"
        )
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be positive; greedy sampling has no log-probs to train on")


@dataclass(frozen=True)
class _Columns:
    """Which part of the vocabulary this rank holds."""

    tp_group: dist.ProcessGroup | None
    first: int
    """Global index of local column 0."""
    count: int
    """Local columns that are not padding; they come first."""
    vocab_size: int

    @classmethod
    def of(cls, logits: Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int) -> _Columns:
        width = logits.shape[-1]
        tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
        if not 1 <= vocab_size <= width * tp_size:
            raise ValueError(
                f"vocab_size = {vocab_size} must lie in [1, {width * tp_size}]: {tp_size} tensor-parallel ranks hold "
                f"{width} columns each"
            )
        first = 0 if tp_group is None else dist.get_rank(tp_group) * width
        return cls(tp_group, first, min(max(vocab_size - first, 0), width), vocab_size)

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if self.tp_group is not None:
            dist.all_reduce(tensor, op, group=self.tp_group)

    def place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each target, clamped into range, and whether this rank holds it."""
        local = targets - self.first
        is_here = (local >= 0) & (local < self.count)
        return local.clamp(0, max(self.count - 1, 0)), is_here


class _VocabParallel(torch.autograd.Function):
    """(log_probs, entropy) of [..., t, V/tp] logits; entropy is empty unless asked for."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, columns: _Columns, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        peak, sums = _local_statistics(logits, targets, columns, temperature, with_entropy)
        global_peak = peak.clone()
        columns.reduce(global_peak, dist.ReduceOp.MAX)
        sums = _rebase(sums, peak, global_peak, columns.place(targets)[1])
        columns.reduce(sums, dist.ReduceOp.SUM)
        sum_exp, weighted, target = sums.unbind()
        log_sum = sum_exp.log()
        is_word = (targets >= 0) & (targets < columns.vocab_size)
        # The target's logit is relative to the global peak, so a large common offset costs no precision.
        log_probs = torch.where(is_word, target - log_sum, torch.nan)
        entropy = log_sum - weighted / sum_exp if with_entropy else log_sum.new_empty(0)
        ctx.save_for_backward(logits, targets, global_peak, log_sum, entropy)
        ctx.columns, ctx.temperature, ctx.with_entropy = columns, temperature, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, peak, log_sum, entropy = ctx.saved_tensors
        columns, temperature = ctx.columns, ctx.temperature
        column, is_here = columns.place(targets)
        grad = torch.empty_like(logits)
        grad[..., columns.count :].zero_()
        for start, size in _slices(logits):
            log_softmax = _scaled(logits, start, size, columns, temperature)
            cut = partial(_cut, start=start, size=size)
            log_softmax.sub_(cut(peak)).sub_(cut(log_sum))
            gradient = _weighted_softmax(
                log_softmax, cut(grad_log_probs), (cut(grad_entropy), cut(entropy)) if ctx.with_entropy else None
            )
            if columns.count:
                gradient.scatter_add_(-1, cut(column), cut(grad_log_probs * is_here).to(gradient.dtype))
            grad.narrow(-2, start, size)[..., : columns.count] = gradient.div_(temperature)
        return grad, None, None, None, None


def _local_statistics(
    logits: Tensor, targets: Tensor, columns: _Columns, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Of this rank's scaled logits x, per token: their peak, and three sums relative to it.

    Returns:
        peak: targets' shape, -inf where all columns are padding.
        sums: [3, *targets' shape]: sum exp(x - peak), sum exp(x - peak) (x - peak) if asked for, and the target's
            x - peak on the rank that holds it.
    """
    column, is_here = columns.place(targets)
    if columns.count == 0:
        dtype = _sum_dtype(logits)
        return (
            torch.full(targets.shape, -torch.inf, dtype=dtype, device=logits.device),
            torch.zeros((3, *targets.shape), dtype=dtype, device=logits.device),
        )
    peaks, sums = [], []
    for start, size in _slices(logits):
        scaled = _scaled(logits, start, size, columns, temperature)
        peak = scaled.amax(-1, keepdim=True)
        scaled.sub_(peak)
        target = scaled.gather(-1, _cut(column, start, size)).squeeze(-1)
        if with_entropy:
            exp = scaled.exp()
            sum_exp, weighted = exp.sum(-1), exp.mul_(scaled).sum(-1)
        else:
            sum_exp = scaled.exp_().sum(-1)
            weighted = torch.zeros_like(sum_exp)
        peaks.append(peak.squeeze(-1))
        sums.append(torch.stack([sum_exp, weighted, target]))
    peak, total = torch.cat(peaks, -1), torch.cat(sums, -1)
    total[2].masked_fill_(~is_here, 0.0)
    return peak, total


def _rebase(sums: Tensor, peak: Tensor, global_peak: Tensor, is_here: Tensor) -> Tensor:
    """The sums of `_local_statistics`, relative to the global peak."""
    sum_exp, weighted, target = sums.unbind()
    shift = torch.where(peak.isinf(), 0.0, peak - global_peak)
    scale = shift.exp()
    return torch.stack(
        [scale * sum_exp, scale * (weighted + shift * sum_exp), torch.where(is_here, target + shift, 0.0)]
    )


def _weighted_softmax(
    log_softmax: Tensor, grad_log_probs: Tensor, entropy_part: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient with respect to the scaled logits, without the target's own term. Overwrites `log_softmax`."""
    if entropy_part is None:
        return log_softmax.exp_().mul_(-grad_log_probs)
    grad_entropy, entropy = entropy_part
    softmax = log_softmax.exp()
    return log_softmax.add_(entropy).mul_(grad_entropy).add_(grad_log_probs).neg_().mul_(softmax)


def _slices(logits: Tensor) -> Iterator[tuple[int, int]]:
    """(start, size) pairs that cut the token dim, so that each slice has few elements; at least one, maybe empty."""
    num_tokens = logits.shape[-2]
    per_token = max(logits.numel() // max(num_tokens, 1), 1)
    step = max(_SLICE_ELEMENTS // per_token, 1)
    for start in range(0, max(num_tokens, 1), step):
        yield start, min(step, num_tokens - start)


def _cut(per_token: Tensor, start: int, size: int) -> Tensor:
    """A slice of a per-token tensor, with a vocabulary dim of 1 added."""
    return per_token.narrow(-1, start, size).unsqueeze(-1)


def _scaled(logits: Tensor, start: int, size: int, columns: _Columns, temperature: float) -> Tensor:
    """A fresh full-precision copy of a slice's real columns, divided by the temperature."""
    part = logits.narrow(-2, start, size)[..., : columns.count]
    return part.to(_sum_dtype(logits), copy=True).div_(temperature)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
