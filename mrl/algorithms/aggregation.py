"""From token losses to the scalar loss of a mini-batch, in any split into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.masking import masked_mean, masked_sum, require_same_shape

LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
"""Names that `aggregate_loss` takes."""


@dataclass(kw_only=True, frozen=True)
class LossNorm:
    """Denominators of one mini-batch over all its micro-batches and data-parallel ranks."""

    num_tokens: int
    """Trained tokens."""
    num_sequences: int
    """Sequences with at least one trained token; the others have no mean and count nowhere."""
    loss_scale_factor: float | None = None
    """Constant divisor of `seq-mean-token-sum-norm`; verl's default for it is the longest response allowed."""

    @classmethod
    def of(cls, loss_mask: Tensor, *, loss_scale_factor: float | None = None) -> LossNorm:
        """The denominators of a whole mini-batch, given its loss mask [B, T] bool."""
        return cls(
            num_tokens=int(loss_mask.sum()),
            num_sequences=int(loss_mask.any(1).sum()),
            loss_scale_factor=loss_scale_factor,
        )


def check_loss_agg_mode(mode: str, loss_scale_factor: float | None) -> None:
    """Raise ValueError unless `mode` is known and has the constant divisor that it may need."""
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f"unknown loss_agg_mode {mode!r}; choose one of {', '.join(LOSS_AGG_MODES)}")
    if mode == "seq-mean-token-sum-norm" and not (loss_scale_factor and loss_scale_factor > 0):
        raise ValueError(
            f"loss_agg_mode {mode!r} divides by loss_scale_factor = {loss_scale_factor}; give it a positive constant, "
            "for example the maximum response length (the padded width would change from batch to batch)"
        )


def aggregate_loss(token_loss: Tensor, loss_mask: Tensor, mode: str, norm: LossNorm) -> Tensor:
    """One micro-batch's share of its mini-batch's loss.

    The shares of any partition of the mini-batch's sequences add up to the loss of the whole, so neither micro-batch
    size nor data-parallel size changes it. A sequence must lie in one piece. With S_i the sum and n_i the number of
    trained tokens of sequence i, the whole is

    - `token-mean`: sum_i S_i / sum_i n_i
    - `token-sum`: sum_i S_i
    - `seq-mean-token-sum`: mean_i S_i
    - `seq-mean-token-mean`: mean_i S_i / n_i
    - `seq-mean-token-sum-norm`: mean_i S_i / loss_scale_factor

    Means over i take the sequences that have a trained token. A mini-batch without any has loss 0.

    Args:
        token_loss: [b, t] float32.
        loss_mask: [b, t] bool.
        mode: one of `LOSS_AGG_MODES`.
        norm: of the whole mini-batch.

    Returns:
        Scalar float32, connected to `token_loss`'s graph.

    Raises:
        ValueError: shapes differ, mode unknown, or its constant divisor missing.

    Source: names and definitions of verl 0.9.1; `seq-mean-token-sum-norm` is Dr. GRPO, arXiv:2503.20783.
    """
    require_same_shape(token_loss=token_loss, loss_mask=loss_mask)
    check_loss_agg_mode(mode, norm.loss_scale_factor)
    if mode == "token-sum":
        return masked_sum(token_loss, loss_mask)
    if mode == "token-mean":
        return masked_sum(token_loss, loss_mask) / max(norm.num_tokens, 1)
    if mode == "seq-mean-token-mean":
        return masked_mean(token_loss, loss_mask, dim=1).sum() / max(norm.num_sequences, 1)
    divisor = float(norm.loss_scale_factor or 1) if mode == "seq-mean-token-sum-norm" else 1.0
    return masked_sum(token_loss, loss_mask) / (max(norm.num_sequences, 1) * divisor)


def token_mean(token_values: Tensor, loss_mask: Tensor, norm: LossNorm) -> Tensor:
    """One micro-batch's share of the mini-batch's mean over trained tokens, detached, float32."""
    return masked_sum(token_values.detach().to(torch.float32), loss_mask) / max(norm.num_tokens, 1)
