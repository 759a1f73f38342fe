"""Log-probs and entropy of logits whose vocabulary is split over a tensor-parallel group.

Layout: rank r of the group holds columns [r * V/tp, (r + 1) * V/tp) of the padded vocabulary. Columns at or above
`vocab_size` are padding and take no part. All sums run in float32 (float64 for float64 logits) and no full-precision
copy of all logits exists; `mrl.ops.vocab_statistics` has the work on a rank's own columns. The forward pass leaves its
inputs as they are, and so does the backward pass without `inplace_backward`.

Every function is called by all of `tp_group` with the same shapes and targets, and its result is the same on all of
it. Each rank's backward gives the gradient of its own columns, without communication, and expects all ranks to
compute the same loss from the result, as tensor-parallel ranks do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mrl.ops import vocab_statistics


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-prob of each target under softmax(logits / temperature).

    Args:
        logits: [b, t, V/tp] or [N, V/tp], floating point, finite.
        targets: [b, t] or [N] int64, global vocabulary indices.
        tp_group: holders of the vocabulary's shards; None for one rank with the whole.
        vocab_size: V without padding.
        temperature: that of sampling, positive.
        inplace_backward: the backward pass writes the gradient over the logits, instead of into as much memory again.
            Only for a caller that owns their memory and needs them no more, like what made them; if an operation that
            saved them runs its backward pass later, or this one runs a second time, autograd raises RuntimeError.

    Returns:
        [b, t] or [N], float32. NaN where a target lies outside [0, vocab_size): checking on the host would stall the
        GPU.

    Raises:
        ValueError: shapes do not fit, vocab_size exceeds the shards, temperature is not positive, or logits to be
            overwritten share memory among themselves.
    """
    columns = _Columns.of(logits, tp_group, vocab_size)
    _check(logits, targets, temperature, inplace_backward)
    return _VocabParallel.apply(logits, targets, columns, temperature, False, inplace_backward)[0]


def vocab_parallel_log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both of the above from one pass over the logits, with one pass back. Arguments and errors as above."""
    columns = _Columns.of(logits, tp_group, vocab_size)
    _check(logits, targets, temperature, inplace_backward)
    return _VocabParallel.apply(logits, targets, columns, temperature, True, inplace_backward)


def _check(logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool) -> None:
    if logits.dim() not in (2, 3) or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} must be [b, t, V/tp] or [N, V/tp] and those of targets {list(targets.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be positive; greedy sampling has no log-probs to train on")
    shared = any(step == 0 and size > 1 for size, step in zip(logits.shape, logits.stride(), strict=True))
    if inplace_backward and shared:
        raise ValueError(
            f"inplace_backward overwrites the logits, whose strides {logits.stride()} let some of them share memory; "
            "pass a copy"
        )


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

    def place(self, targets: Tensor) -> Tensor:
        """Local column of each target, -1 where another rank holds it or none."""
        local = targets - self.first
        return torch.where((local >= 0) & (local < self.count), local, -1)


class _VocabParallel(torch.autograd.Function):
    """(log_probs, entropy) of [..., t, V/tp] logits; entropy is empty unless asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        columns: _Columns,
        temperature: float,
        with_entropy: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        local = columns.place(targets)
        peak, sums = vocab_statistics.implementation(logits).statistics(
            logits, local, count=columns.count, temperature=temperature, with_entropy=with_entropy
        )
        global_peak = peak.clone()
        columns.reduce(global_peak, dist.ReduceOp.MAX)
        sums = _rebase(sums, (peak - global_peak) / temperature, local >= 0)
        columns.reduce(sums, dist.ReduceOp.SUM)
        sum_exp, weighted, target = sums.unbind()
        log_sum = sum_exp.log()
        is_word = (targets >= 0) & (targets < columns.vocab_size)
        # The target's logit is relative to the global peak, so a large common offset costs no precision.
        log_probs = torch.where(is_word, target - log_sum, torch.nan)
        entropy = log_sum - weighted / sum_exp if with_entropy else log_sum.new_empty(0)
        ctx.save_for_backward(logits, local, global_peak, log_sum, entropy)
        ctx.count, ctx.temperature, ctx.with_entropy = columns.count, temperature, with_entropy
        ctx.inplace = inplace_backward
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, peak, log_sum, entropy = ctx.saved_tensors
        grad = vocab_statistics.implementation(logits).gradient(
            logits,
            local,
            peak,
            log_sum,
            grad_log_probs,
            (grad_entropy, entropy) if ctx.with_entropy else None,
            count=ctx.count,
            temperature=ctx.temperature,
            inplace=ctx.inplace,
        )
        return grad, None, None, None, None, None


def _rebase(sums: Tensor, shift: Tensor, is_here: Tensor) -> Tensor:
    """A rank's sums relative to a peak that lies `-shift` above its own; a rank without columns has an infinite one."""
    sum_exp, weighted, target = sums.unbind()
    shift = torch.where(shift.isinf(), 0.0, shift)
    scale = shift.exp()
    return torch.stack(
        [scale * sum_exp, scale * (weighted + shift * sum_exp), torch.where(is_here, target + shift, 0.0)]
    )
