"""Evaluating one policy loss on a few tokens."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from mrl.algorithms.policy_losses import PolicyInputs, PolicyLoss
from mrl.types import TrainBatch


class Evaluation(NamedTuple):
    losses: list[list[float]]
    gradient: list[list[float]]
    """Of the sum of trained tokens' losses, by log-prob."""
    ratio: list[list[float]]
    fractions: dict[str, list[list[bool]]]


def evaluate_loss(
    loss: PolicyLoss,
    log_ratio: list[list[float]],
    advantages: list[list[float]],
    *,
    old: list[list[float]] | None = None,
    mask: list[list[int]] | None = None,
) -> Evaluation:
    """In float64, with log_probs = old + log_ratio; old is 0 and every token trained unless given."""
    drift = torch.tensor(log_ratio, dtype=torch.float64)
    old_log_probs = torch.zeros_like(drift) if old is None else torch.tensor(old, dtype=torch.float64)
    leaf = (old_log_probs + drift).requires_grad_()
    batch = TrainBatch(
        tokens=torch.arange(drift.numel()).reshape(drift.shape),
        lengths=torch.full(drift.shape[:1], drift.shape[1]),
        loss_mask=torch.ones_like(drift).bool() if mask is None else torch.tensor(mask).bool(),
        old_log_probs=old_log_probs,
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )
    inputs = PolicyInputs(
        tokens=batch.tokens,
        loss_mask=batch.loss_mask,
        log_probs=leaf,
        old_log_probs=batch.required("old_log_probs"),
        advantages=batch.required("advantages"),
    )
    terms = loss.bind(batch)(inputs)
    (gradient,) = torch.autograd.grad(terms.token_loss[batch.loss_mask].sum(), leaf)
    assert not terms.ratio.requires_grad
    fractions = {name: flags.tolist() for name, flags in terms.fractions.items()}
    return Evaluation(terms.token_loss.tolist(), gradient.tolist(), terms.ratio.tolist(), fractions)


@pytest.fixture
def evaluate() -> Callable[..., Evaluation]:
    """`evaluate_loss`."""
    return evaluate_loss
