"""What every advantage estimator is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(kw_only=True, frozen=True)
class AdvantageInputs:
    """All samples of a step, on every rank."""

    rewards: Tensor
    """[B, T] float32, per token, KL penalty already subtracted; an estimator may write over them."""
    loss_mask: Tensor
    """[B, T] bool."""
    groups: Tensor
    """[B] int64; the samples of one prompt share a number."""
    values: Tensor | None = None
    """[B, T] float32, the critic's before this step's updates; None without a critic."""
    baselines: Tensor | None = None
    """[B] float32, the score of the greedy response to each sample's prompt; None where none was generated."""


class Advantages(NamedTuple):
    """Both [B, T] float32, zero where the mask is False."""

    advantages: Tensor
    returns: Tensor
    """The critic's regression target; without a critic, what the advantages were made from."""


class Estimator(Protocol):
    """One entry of `algorithm.adv_estimator`, with its settings bound."""

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """Advantages of every token. Pure: the same on every rank."""
        ...
