"""KL estimates against the reference policy, the in-reward penalty and its coefficient."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mrl.algorithms.blocks import count_rows, selected, sum_blocks
from mrl.algorithms.masking import require_same_shape

_ESTIMATOR_OF = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}

KL_KINDS = (*_ESTIMATOR_OF, *(f"{kind}+" for kind in _ESTIMATOR_OF))
"""Names that `compute_kl` takes."""


class MeanKL(NamedTuple):
    """Of a whole batch, in nats per token; 0 of no trained tokens."""

    over_tokens: float
    over_samples: float
    """Of each sample's trained tokens first, then of the samples that have any."""


def compute_kl(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the log-probs of tokens that the policy sampled.

    With d = log_probs - ref_log_probs:

    - `kl`, `k1`: d. Unbiased, high variance, negative for some tokens.
    - `abs`: |d|.
    - `mse`, `k2`: d^2 / 2. Biased; its expected gradient is that of the KL.
    - `low_var_kl`, `k3`: exp(-d) - 1 + d. Unbiased, never negative. d is clamped to [-20, 20] and the result to at
      most 10, as verl publishes it; beyond either bound the gradient is zero.

    A trailing "+" ("k3+") keeps the value and takes the gradient of k2, because the expected gradients of k1 and k3
    are not the gradient of the KL.

    Args:
        log_probs, ref_log_probs: [B, T] float32, natural log.
        kind: one of `KL_KINDS`.

    Returns:
        [B, T] float32, every position, masked or not.

    Raises:
        ValueError: unknown kind, or shapes differ.

    Source: Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    check_kl_kind(kind)
    require_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    difference = log_probs - ref_log_probs
    estimate = _estimate(difference, _ESTIMATOR_OF[kind.removesuffix("+")])
    if not kind.endswith("+"):
        return estimate
    surrogate = 0.5 * difference.square()
    return estimate.detach() + (surrogate - surrogate.detach())


def check_kl_kind(kind: str) -> None:
    """Raise ValueError unless `kind` names an estimator."""
    if kind not in KL_KINDS:
        raise ValueError(f"unknown KL estimate {kind!r}; choose one of {', '.join(KL_KINDS)}")


def _estimate(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference.abs()
    if estimator == "k2":
        return 0.5 * difference.square()
    bounded = difference.clamp(-20.0, 20.0)
    return (torch.expm1(-bounded) + bounded).clamp(max=10.0)


@torch.no_grad()
def subtract_kl_(
    rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, loss_mask: Tensor, *, kl_coef: float, kind: str
) -> MeanKL:
    """Subtract kl_coef * KL from the rewards of trained tokens, in place, and return the batch's KL.

    Args:
        rewards: [B, T] float32, before the penalty; unchanged where the mask is False.
        log_probs: [B, T] float32, of the policy that sampled (`old_log_probs`).
        ref_log_probs: [B, T] float32.
        loss_mask: [B, T] bool.
        kl_coef: weight of the penalty, a controller's current one.
        kind: as in `compute_kl`.

    Raises:
        ValueError: unknown kind, or shapes differ.
    """
    require_same_shape(rewards=rewards, log_probs=log_probs, ref_log_probs=ref_log_probs, loss_mask=loss_mask)

    def subtract(mask: Tensor, rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor) -> list[Tensor]:
        kl = selected(compute_kl(log_probs, ref_log_probs, kind), mask)
        rewards.sub_(kl, alpha=kl_coef)
        return _kl_sums(kl, mask)

    return _mean_kl(*sum_blocks(subtract, loss_mask, rewards, log_probs, ref_log_probs))


@torch.no_grad()
def compute_mean_kl(log_probs: Tensor, ref_log_probs: Tensor, loss_mask: Tensor, kind: str) -> MeanKL:
    """Means of `compute_kl` over the trained tokens of a whole batch, all [B, T]."""

    def sums(mask: Tensor, log_probs: Tensor, ref_log_probs: Tensor) -> list[Tensor]:
        return _kl_sums(selected(compute_kl(log_probs, ref_log_probs, kind), mask), mask)

    return _mean_kl(*sum_blocks(sums, loss_mask, log_probs, ref_log_probs))


def _kl_sums(kl: Tensor, mask: Tensor) -> list[Tensor]:
    """Of the tokens' KL and of the samples' means, and how many tokens and samples they are."""
    counts, sums = count_rows(mask), kl.sum(1).double()
    return [sums.sum(), (sums / counts.clamp(min=1)).sum(), counts.sum(), counts.count_nonzero()]


def _mean_kl(of_tokens: float, of_samples: float, num_tokens: float, num_samples: float) -> MeanKL:
    return MeanKL(of_tokens / max(num_tokens, 1), of_samples / max(num_samples, 1))


class KLController(Protocol):
    """Weight of the KL penalty in the reward over the course of a run."""

    kl_coef: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Take note of the KL of `n_steps` new samples."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKLController:
    """A coefficient that never changes."""

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        """Empty: the coefficient is the configuration's, also after a resume."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Accepts any state, as a resumed run may have changed its controller."""


class AdaptiveKLController:
    """A coefficient that steers the KL towards a target by proportional control.

    Each update multiplies it by 1 + clip(current_kl / target_kl - 1, -0.2, 0.2) * n_steps / horizon.

    Args:
        kl_coef: initial coefficient.
        target_kl: in the units of what `update` is given, nats per token for `MeanKL.over_samples`.
        horizon: samples over which a constant error of 0.2 changes the coefficient by about 20 %.

    Raises:
        ValueError: target_kl or horizon is not positive.

    Source: Ziegler et al., arXiv:1909.08593, section 2.2.
    """

    max_error = 0.2

    def __init__(self, kl_coef: float, *, target_kl: float, horizon: float) -> None:
        for name, value in (("target_kl", target_kl), ("horizon", horizon)):
            if value <= 0:
                raise ValueError(f"algorithm.kl_ctrl.{name} = {value} must be positive for the adaptive controller")
        self.kl_coef = kl_coef
        self.target_kl = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the coefficient by one proportional step.

        Raises:
            ValueError: n_steps is so large against the horizon that one step could turn the coefficient negative.
        """
        if self.max_error * n_steps >= self.horizon:
            raise ValueError(
                f"{n_steps} samples per step with algorithm.kl_ctrl.horizon = {self.horizon} let one update change the "
                f"KL coefficient by {self.max_error * n_steps / self.horizon:.0%}, through zero; set the horizon above "
                f"{self.max_error * n_steps:.0f}, better above {10 * n_steps}"
            )
        error = min(max(current_kl / self.target_kl - 1, -self.max_error), self.max_error)
        self.kl_coef *= 1 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The current coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved coefficient; the state of a fixed controller leaves the initial one."""
        self.kl_coef = state.get("kl_coef", self.kl_coef)
