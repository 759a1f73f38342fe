"""Statistics of vocabulary columns and the gradient through them, as Triton kernels bound by memory.

Same functions as `mrl.ops.vocab_reference`, which says what they compute. The forward pass reads the logits once, the
backward pass reads them once and writes the gradient once, over them if asked to. Sums run in float32. A row whose
length is no multiple of 16 bytes begins at odd addresses and is read in smaller pieces: right, but slower.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""In place of columns that are not there: their exponential is 0, and unlike -inf they give no NaN times that."""
_FARTHEST = tl.constexpr(-1e30)
"""Bound of the distance between two peaks, for the same reason."""


@dataclass(kw_only=True, frozen=True)
class Tuning:
    """How a kernel is cut."""

    block: int
    """Columns that a program handles at once."""
    num_warps: int
    num_stages: int = 1
    """Blocks that are on their way to a program at once."""
    num_blocks: int = 1
    """Of the gradient kernel: how many a program handles one after the other."""


# 16 bytes per load and two loads per thread and block: few registers, so that the other programs of a multiprocessor
# hide the latency of memory. tools/bench_log_probs.py --sweep measures others.
STATISTICS = Tuning(block=4096, num_warps=8)
GRADIENT = Tuning(block=4096, num_warps=8)


def statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    count: int,
    temperature: float,
    with_entropy: bool,
    tuning: Tuning = STATISTICS,
) -> tuple[Tensor, Tensor]:
    """See `mrl.ops.vocab_reference.statistics`; one program per token."""
    peak = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device=logits.device)
    sums = torch.zeros((3, *targets.shape), dtype=torch.float32, device=logits.device)
    if count == 0 or targets.numel() == 0:
        return peak, sums
    vector = 16 // logits.element_size()
    with _device_of(logits):
        _statistics_kernel[(targets.numel(),)](
            logits,
            targets.contiguous(),
            peak,
            sums,
            targets.numel(),
            targets.shape[-1],
            *_strides(logits),
            count,
            1 / temperature,
            WITH_ENTROPY=with_entropy,
            LANES=max(tuning.block // vector, 1),
            VECTOR=vector,
            NUM_STAGES=tuning.num_stages,
            num_warps=tuning.num_warps,
        )
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
    tuning: Tuning = GRADIENT,
) -> Tensor:
    """See `mrl.ops.vocab_reference.gradient`; one program per token and part of its columns."""
    grad = logits.detach() if inplace else torch.empty_like(logits)
    if count == 0 or targets.numel() == 0:
        return grad.zero_()
    part = tuning.block * tuning.num_blocks
    num_parts = triton.cdiv(logits.shape[-1], part)
    grad_entropy, entropy = entropy_terms or (grad_log_probs, log_sum)
    with _device_of(logits):
        _gradient_kernel[(targets.numel() * num_parts,)](
            logits,
            grad,
            *(each.contiguous() for each in (targets, peak, log_sum, grad_log_probs, grad_entropy, entropy)),
            num_parts,
            targets.shape[-1],
            *_strides(logits),
            *_strides(grad),
            logits.shape[-1],
            count,
            1 / temperature,
            WITH_ENTROPY=entropy_terms is not None,
            BLOCK=tuning.block,
            PART=part,
            num_warps=tuning.num_warps,
        )
    if inplace:
        torch.autograd.graph.increment_version(grad)
    return grad


def _strides(logits: Tensor) -> tuple[int, int]:
    """Elements from one sample to the next and from one token to the next."""
    return (logits.stride(0) if logits.dim() == 3 else 0), logits.stride(-2)


def _device_of(logits: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


@triton.jit
def _row_start(
    row: tl.tensor, tokens_per_sample: tl.tensor, sample_stride: tl.tensor, token_stride: tl.tensor
) -> tl.tensor:
    """Elements before a token's row, in 64 bits: 16k tokens of a 152k vocabulary are more than 2^31."""
    sample = row // tokens_per_sample
    token = row % tokens_per_sample
    return sample.to(tl.int64) * sample_stride + token.to(tl.int64) * token_stride


@triton.jit
def _add_block(
    block: tl.tensor,
    peak: tl.tensor,
    sum_exp: tl.tensor,
    weighted: tl.tensor,
    rate: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running peak and sums of every lane, [LANES], after one more block of logits, [LANES, VECTOR].

    `weighted` sums exp(x) (logit - peak), without the temperature.
    """
    new_peak = tl.maximum(peak, tl.max(block, 1))
    shift = tl.maximum(peak - new_peak, _FARTHEST)
    scale = tl.exp2(shift * rate)
    distance = block - new_peak[:, None]
    exp = tl.exp2(distance * rate)
    if WITH_ENTROPY:
        weighted = scale * (weighted + shift * sum_exp) + tl.sum(exp * distance, 1)
    sum_exp = scale * sum_exp + tl.sum(exp, 1)
    return new_peak, sum_exp, weighted


@triton.jit(do_not_specialize=["num_rows", "tokens_per_sample"])
def _statistics_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    tokens_per_sample: tl.tensor,
    sample_stride: tl.int64,
    token_stride: tl.int64,
    count: tl.tensor,
    inverse_temperature: tl.float32,
    WITH_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """One row per program. Every lane has a peak of its own until the end, so that threads need not meet before."""
    BLOCK: tl.constexpr = LANES * VECTOR
    row = tl.program_id(0)
    start = logits + _row_start(row, tokens_per_sample, sample_stride, token_stride)
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    rate = inverse_temperature * _LOG2_E
    peak = tl.zeros([LANES], tl.float32) + tl.load(start).to(tl.float32)
    sum_exp = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = count // BLOCK * BLOCK
    for begin in tl.range(0, whole, BLOCK, num_stages=NUM_STAGES):
        block = tl.load(start + begin + columns, eviction_policy="evict_first").to(tl.float32)
        peak, sum_exp, weighted = _add_block(block, peak, sum_exp, weighted, rate, WITH_ENTROPY)
    if whole < count:
        rest = tl.load(start + whole + columns, mask=whole + columns < count, other=0.0).to(tl.float32)
        rest = tl.where(whole + columns < count, rest, _LOWEST)
        peak, sum_exp, weighted = _add_block(rest, peak, sum_exp, weighted, rate, WITH_ENTROPY)
    row_peak = tl.max(peak, 0)
    shift = tl.maximum(peak - row_peak, _FARTHEST)
    scale = tl.exp2(shift * rate)
    target = tl.load(targets + row)
    target_logit = tl.load(start + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(peaks + row, row_peak)
    tl.store(sums + row, tl.sum(scale * sum_exp, 0))
    if WITH_ENTROPY:
        tl.store(sums + num_rows + row, tl.sum(scale * (weighted + shift * sum_exp), 0) * inverse_temperature)
    tl.store(sums + 2 * num_rows + row, (target_logit - row_peak) * inverse_temperature, mask=target >= 0)


@triton.jit(do_not_specialize=["num_parts", "tokens_per_sample"])
def _gradient_kernel(
    logits: tl.tensor,
    gradient: tl.tensor,
    targets: tl.tensor,
    peaks: tl.tensor,
    log_sums: tl.tensor,
    grad_log_probs: tl.tensor,
    grad_entropies: tl.tensor,
    entropies: tl.tensor,
    num_parts: tl.tensor,
    tokens_per_sample: tl.tensor,
    sample_stride: tl.int64,
    token_stride: tl.int64,
    grad_sample_stride: tl.int64,
    grad_token_stride: tl.int64,
    width: tl.tensor,
    count: tl.tensor,
    inverse_temperature: tl.float32,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """PART columns of a row per program, which reads a block before it writes it: both may be the same memory."""
    row = tl.program_id(0) // num_parts
    first = tl.program_id(0) % num_parts * PART
    start = logits + _row_start(row, tokens_per_sample, sample_stride, token_stride)
    grad_start = gradient + _row_start(row, tokens_per_sample, grad_sample_stride, grad_token_stride)
    peak = tl.load(peaks + row)
    log_sum = tl.load(log_sums + row) * _LOG2_E
    rate = inverse_temperature * _LOG2_E
    weight = tl.load(grad_log_probs + row) * inverse_temperature
    target = tl.load(targets + row).to(tl.int32)
    constant, slope = -weight, 0.0
    if WITH_ENTROPY:
        entropy_weight = tl.load(grad_entropies + row) * inverse_temperature
        constant = -weight - entropy_weight * tl.load(entropies + row)
        slope = -entropy_weight / _LOG2_E
    lanes = tl.arange(0, BLOCK)
    for begin in tl.range(first, tl.minimum(first + PART, width), BLOCK):
        # Masked by the row's width, which is as well aligned as its start; `count` need not be.
        inside = begin + lanes < width
        block = tl.load(start + begin + lanes, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        exponent = (block - peak) * rate - log_sum
        factor = constant
        if WITH_ENTROPY:
            factor = constant + slope * exponent
        grad = tl.exp2(exponent) * factor
        # Few blocks hold the target or padding: comparing every column would cost as much as all the rest.
        if (target >= begin) & (target < begin + BLOCK):
            grad += tl.where(begin + lanes == target, weight, 0.0)
        if begin + BLOCK > count:
            grad = tl.where(begin + lanes < count, grad, 0.0)
        tl.store(grad_start + begin + lanes, grad.to(gradient.dtype.element_ty), mask=inside)
