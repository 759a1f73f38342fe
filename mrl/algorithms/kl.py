"""KL estimates against the reference policy, the in-reward penalty and its coefficient."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mrl.algorithms.blocks import map_blocks, sum_blocks
from mrl.algorithms.masking import masked_mean, masked_sum, require_same_shape

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
def apply_kl_penalty(
    rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, loss_mask: Tensor, *, kl_coef: float, kind: str
) -> tuple[Tensor, float]:
    """Per-token rewards with the KL penalty subtracted, and the batch's KL.

    Args:
        rewards: [B, T] float32, before the penalty.
        log_probs: [B, T] float32, of the policy that sampled (`old_log_probs`).
        ref_log_probs: [B, T] float32.
        loss_mask: [B, T] bool.
        kl_coef: weight of the penalty, a controller's current one.
        kind: as in `compute_kl`.

    Returns:
        rewards: [B, T] float32, rewards - kl_coef * KL on trained tokens and unchanged elsewhere.
        kl: nats per token, averaged over each sample's trained tokens, then over the samples that have any. This is
            what a controller's `update` takes.

    Raises:
        ValueError: unknown kind, or shapes differ.
    """
    require_same_shape(rewards=rewards, log_probs=log_probs, ref_log_probs=ref_log_probs, loss_mask=loss_mask)
    per_sample, samples = sum_blocks(
        lambda log_probs, ref_log_probs, mask: _sample_means(compute_kl(log_probs, ref_log_probs, kind), mask),
        log_probs,
        ref_log_probs,
        loss_mask,
    )
    penalised = map_blocks(
        lambda rewards, log_probs, ref_log_probs, mask: rewards.sub(
            torch.where(mask, compute_kl(log_probs, ref_log_probs, kind), 0.0), alpha=kl_coef
        ),
        rewards,
        log_probs,
        ref_log_probs,
        loss_mask,
    )
    return penalised, per_sample / max(samples, 1)


@torch.no_grad()
def compute_mean_kl(log_probs: Tensor, ref_log_probs: Tensor, loss_mask: Tensor, kind: str) -> float:
    """Mean of `compute_kl` over the trained tokens of a whole batch, all [B, T]; 0 of none."""
    total, count = sum_blocks(
        lambda log_probs, ref_log_probs, mask: [
            masked_sum(compute_kl(log_probs, ref_log_probs, kind), mask, dim=1).double().sum(),
            mask.count_nonzero(),
        ],
        log_probs,
        ref_log_probs,
        loss_mask,
    )
    return total / max(count, 1)


def _sample_means(kl: Tensor, mask: Tensor) -> list[Tensor]:
    """Sum of the samples' means over their trained tokens, and the number of samples that have any."""
    return [masked_mean(kl.double(), mask, dim=1).sum(), mask.any(1).count_nonzero()]


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
        target_kl: in the units of what `update` is given, nats per token for `apply_kl_penalty`.
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
