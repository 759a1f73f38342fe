"""Correcting for samples that came from another distribution than the trainer's: weights, rejection, and how far apart.

An engine samples with other kernels, another precision or older weights than the trainer computes log-probs with. All
functions take the log-ratio of the two, log_probs - rollout_log_probs, of the trainer's policy over the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mrl.algorithms.blocks import count_rows, selected, sum_blocks
from mrl.algorithms.masking import masked_max, masked_mean, masked_sum, require_same_shape

MAX_LOG_RATIO = 20.0
"""Log-ratios, of tokens or of whole sequences, are clamped to this on both sides before they are exponentiated."""

_MISMATCH_MEANS = ("log_prob_abs_diff_mean", "kl_k1", "kl_k3", "outside_fraction")

Level = Literal["token", "sequence"]
Divergence = Literal["k1", "k2", "k3"]
Scope = Literal["token", "seq_sum", "seq_mean", "seq_max"]


@dataclass(kw_only=True, frozen=True)
class Weighting:
    """Importance weights of the actor's policy loss."""

    level: Level
    """A weight for each token, or one for a sequence: the product of its tokens' ratios."""
    upper: float
    lower: float | None = None
    """None truncates weights to `upper` (TIS); a number sets those outside [lower, upper] to 0 (IcePop)."""
    batch_normalize: bool = False
    """Divide by the mean weight, over tokens or over sequences."""


@dataclass(kw_only=True, frozen=True)
class Rejection:
    """A test that a token, or all of a sequence's tokens, must pass."""

    scope: Scope
    divergence: Divergence
    """k1 is minus the log-ratio, k2 half its square, k3 ratio - 1 - log-ratio."""
    upper: float
    """Largest k2 or k3, or for k1 the largest ratio rollout / trainer."""
    lower: float | None = None
    """For k1 the smallest ratio; k2 and k3 are never negative and have none."""

    def __post_init__(self) -> None:
        if (self.lower is None) == (self.divergence == "k1"):
            raise ValueError(f"lower = {self.lower}, but k1 needs a lower bound and k2 and k3 have none")


class CorrectionResult(NamedTuple):
    """What a correction does to a batch; None where it does nothing of that kind."""

    weights: Tensor | None
    """[b, t] float, without gradient, zero where the mask is False."""
    accepted: Tensor | None
    """[b, t] bool."""


@dataclass(kw_only=True, frozen=True)
class RolloutCorrection:
    """Weights and rejection together; both look at the uncorrected batch."""

    weighting: Weighting | None = None
    rejections: tuple[Rejection, ...] = ()
    ratio_bounds: tuple[float, float] = (0.5, 2.0)
    """Ratios outside count in `outside_fraction`; they correct nothing."""

    @property
    def acts(self) -> bool:
        """Whether there is anything that it corrects."""
        return self.weighting is not None or bool(self.rejections)

    @torch.no_grad()
    def compute(self, log_ratio: Tensor, loss_mask: Tensor) -> CorrectionResult:
        """See `compute_weights` and `compute_accepted`; [b, t], every sequence whole."""
        weights = compute_weights(log_ratio, loss_mask, self.weighting) if self.weighting else None
        accepted = compute_accepted(log_ratio, loss_mask, self.rejections) if self.rejections else None
        return CorrectionResult(weights, accepted)


@torch.no_grad()
def compute_weights(log_ratio: Tensor, loss_mask: Tensor, weighting: Weighting) -> Tensor:
    """Importance weights trainer / rollout, bounded as `weighting` says and then normalized if it says so.

    Args:
        log_ratio: [b, t] float, log_probs - rollout_log_probs.
        loss_mask: [b, t] bool.

    Returns:
        [b, t], same dtype, without gradient, zero where the mask is False.

    Raises:
        ValueError: shapes differ.

    Source: truncated weights: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    (2025); of sequences: Liu et al., "When Speed Kills Stability" (2025); zero outside bounds: IcePop, Ling Team,
    "Small Leak Can Sink a Great Ship" (2025). Definitions and the order of operations are verl 0.9.1's.
    """
    require_same_shape(log_ratio=log_ratio, loss_mask=loss_mask)
    weights = _bound(compute_ratio(log_ratio, loss_mask, weighting.level), weighting)
    if weighting.batch_normalize:
        mean = _mean_weight(weights, loss_mask, weighting.level)
        weights = torch.where(mean > 1e-8, weights / mean, weights)
    return torch.where(loss_mask, weights, 0.0)


def compute_ratio(log_ratio: Tensor, loss_mask: Tensor, level: Level) -> Tensor:
    """Probability ratio trainer / rollout of each token, or its sequence's over trained tokens. [b, t], unbounded."""
    if level == "sequence":
        log_ratio = masked_sum(log_ratio, loss_mask, dim=1)[:, None].expand_as(log_ratio)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@torch.no_grad()
def compute_accepted(log_ratio: Tensor, loss_mask: Tensor, rejections: Sequence[Rejection]) -> Tensor:
    """Which tokens pass every test.

    With d the log-ratio of a token, its divergence is -d (k1), d^2 / 2 (k2) or exp(d) - 1 - d (k3). `token` tests it
    as it is, the other scopes the sum, mean or maximum over the sequence's trained tokens, for all of them at once.
    k1 passes within [log lower, log upper], k2 and k3 up to `upper`: `seq_mean` of k1 bounds the geometric mean of a
    sequence's ratios.

    Args:
        log_ratio: [b, t] float, log_probs - rollout_log_probs.
        loss_mask: [b, t] bool.

    Returns:
        [b, t] bool; what it says where the mask is False means nothing.

    Raises:
        ValueError: shapes differ.

    Source: Liu et al., "When Speed Kills Stability" (2025); names and bounds of verl 0.9.1, whose k1 bounds are those
    of rollout / trainer, the inverse of its weights' ratio.
    """
    require_same_shape(log_ratio=log_ratio, loss_mask=loss_mask)
    accepted = torch.ones_like(loss_mask)
    for rejection in rejections:
        accepted = accepted & _passes(_statistic(log_ratio, loss_mask, rejection), rejection)
    return accepted


@torch.no_grad()
def correction_metrics(
    correction: RolloutCorrection, log_ratio: Tensor, loss_mask: Tensor, result: CorrectionResult
) -> dict[str, float]:
    """What a correction did to a whole batch, by verl's names.

    `rollout_is_mean`, `_max`, `_min` and `_eff_sample_size` (a share of the tokens) are of the bounded weights before
    normalization, `rollout_is_ratio_fraction_high` and `_low` the shares of tokens (or sequences) whose ratio lies
    above and below the bounds, where 1 / upper stands in for a lower one. `rollout_rs_masked_fraction` is the share of
    tokens rejected, `rollout_rs_seq_masked_fraction` that of sequences with a token rejected.
    """
    metrics: dict[str, float] = {}
    if correction.weighting is not None:
        metrics |= _weight_metrics(log_ratio, loss_mask, correction.weighting)
    if result.accepted is not None:
        rejected = loss_mask & ~result.accepted
        metrics["rollout_rs_masked_fraction"] = float(masked_mean(rejected.double(), loss_mask))
        by_sequence = masked_mean(rejected.any(1).double(), loss_mask.any(1))
        metrics["rollout_rs_seq_masked_fraction"] = float(by_sequence)
    return metrics


def mismatch_means(log_ratio: Tensor, ratio_bounds: tuple[float, float]) -> dict[str, Tensor]:
    """Token values whose means over trained tokens say how far trainer and engine are apart. Each [b, t].

    `log_prob_abs_diff_mean`: |d|. `kl_k1` and `kl_k3`: estimates of KL(rollout || trainer), -d and exp(d) - 1 - d.
    `outside_fraction`: whether the ratio exp(d) lies outside its bounds. d, the log-ratio, is clamped to +-20.
    """
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    excess, (lower, upper) = torch.expm1(bounded), ratio_bounds
    outside = ((excess < lower - 1) | (excess > upper - 1)).to(log_ratio.dtype)
    return dict(zip(_MISMATCH_MEANS, (log_ratio.abs(), -bounded, excess - bounded, outside), strict=True))


@torch.no_grad()
def compute_mismatch(
    log_probs: Tensor, rollout_log_probs: Tensor, loss_mask: Tensor, ratio_bounds: tuple[float, float]
) -> dict[str, float]:
    """How far trainer and engine are apart, over the trained tokens of a whole batch.

    The means of `mismatch_means`, the largest |d| as `log_prob_abs_diff_max`, and `effective_sample_size`, the share
    of the tokens that a sample of them weighted with their ratios is worth: (sum r)^2 / (n sum r^2).

    Args:
        log_probs, rollout_log_probs: [B, T] float.
        loss_mask: [B, T] bool.
        ratio_bounds: for `outside_fraction`.
    """
    bounds = [math.log(bound) if bound > 0 else -math.inf for bound in ratio_bounds]
    peaks: list[float] = []

    def sums(mask: Tensor, log_probs: Tensor, rollout_log_probs: Tensor) -> list[Tensor]:
        log_ratio = selected(log_probs - rollout_log_probs, mask)
        outside = (log_ratio.clamp(*bounds) != log_ratio) & mask
        magnitudes = log_ratio.abs()
        peaks.append(float(magnitudes.amax()))
        # In float64, in which a sum of exp(d) - 1 - d may be taken term by term. Masked entries are 1 in `ratio`.
        bounded = log_ratio.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).double().flatten()
        ratio = bounded.exp()
        own = count_rows(mask).sum()
        masked, excess = mask.numel() - own, ratio.sum() - mask.numel()
        minus_k1, square = bounded.sum(), torch.dot(ratio, ratio) - masked
        return [
            own,
            magnitudes.sum(1).double().sum(),
            -minus_k1,
            excess - minus_k1,
            count_rows(outside).sum(),
            excess,
            square,
        ]

    count, *totals, excess, squares = sum_blocks(sums, loss_mask, log_probs, rollout_log_probs)
    return {
        **{name: total / max(count, 1) for name, total in zip(_MISMATCH_MEANS, totals, strict=True)},
        "log_prob_abs_diff_max": max(peaks),
        "effective_sample_size": (count + excess) ** 2 / (count * squares) if count and squares > 0 else 0.0,
    }


def _bound(ratio: Tensor, weighting: Weighting) -> Tensor:
    if weighting.lower is None:
        return ratio.clamp(max=weighting.upper)
    inside = (ratio >= weighting.lower) & (ratio <= weighting.upper)
    return torch.where(inside, ratio, 0.0)


def _mean_weight(weights: Tensor, loss_mask: Tensor, level: Level) -> Tensor:
    if level == "token":
        return masked_mean(weights, loss_mask)
    return masked_mean(masked_mean(weights, loss_mask, dim=1), loss_mask.any(1))


def _statistic(log_ratio: Tensor, loss_mask: Tensor, rejection: Rejection) -> Tensor:
    """[b, t] for tokens, [b, 1] for sequences."""
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    values = {
        "k1": lambda: -bounded,
        "k2": lambda: 0.5 * bounded.square(),
        "k3": lambda: torch.expm1(bounded) - bounded,
    }[rejection.divergence]()
    if rejection.scope == "token":
        return values
    if rejection.scope == "seq_sum":
        return masked_sum(values, loss_mask, dim=1)[:, None]
    if rejection.scope == "seq_mean":
        return masked_mean(values, loss_mask, dim=1)[:, None]
    return torch.where(loss_mask, values, 0.0).amax(1, keepdim=True)


def _passes(statistic: Tensor, rejection: Rejection) -> Tensor:
    if rejection.lower is None:
        return statistic <= rejection.upper
    return (statistic >= math.log(rejection.lower)) & (statistic <= math.log(rejection.upper))


def _weight_metrics(log_ratio: Tensor, loss_mask: Tensor, weighting: Weighting) -> dict[str, float]:
    ratio = compute_ratio(log_ratio, loss_mask, weighting.level)
    weights = _bound(ratio, weighting).double()
    lower = 1 / weighting.upper if weighting.lower is None else weighting.lower
    shared = weighting.level == "sequence"
    units, unit_mask = (ratio[:, 0], loss_mask.any(1)) if shared else (ratio, loss_mask)
    metrics = {
        "rollout_is_mean": float(masked_mean(weights, loss_mask)),
        "rollout_is_max": float(masked_max(weights, loss_mask, empty=0.0)),
        "rollout_is_min": -float(masked_max(-weights, loss_mask, empty=-weighting.upper)),
        "rollout_is_eff_sample_size": _effective_sample_size(weights, loss_mask),
        "rollout_is_ratio_fraction_high": float(masked_mean((units > weighting.upper).double(), unit_mask)),
        "rollout_is_ratio_fraction_low": float(masked_mean((units < lower).double(), unit_mask)),
    }
    if weighting.batch_normalize:
        metrics["rollout_is_batch_norm_factor"] = float(_mean_weight(weights, loss_mask, weighting.level))
    return metrics


def _effective_sample_size(weights: Tensor, loss_mask: Tensor) -> float:
    exact = weights.double()
    mean, mean_square = masked_mean(exact, loss_mask), masked_mean(exact.square(), loss_mask)
    return float(mean.square() / mean_square) if mean_square > 0 else 0.0
