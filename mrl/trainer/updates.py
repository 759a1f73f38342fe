"""How a role walks over the samples of a step: epochs, mini-batches, one optimizer step each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mrl.interfaces import LossFn, TrainEngine
from mrl.types import MicroBatchLimit, TrainBatch

Metrics = dict[str, float]


@dataclass(kw_only=True, frozen=True)
class UpdateSchedule:
    """How one role walks over the samples of a step."""

    mini_batch_size: int
    """Samples per optimizer step, over all ranks."""
    update_limit: MicroBatchLimit
    """Of passes with gradients."""
    forward_limit: MicroBatchLimit
    """Of passes without."""
    epochs: int
    shuffle: bool
    seed: int


class Objective(Protocol):
    """What a role minimises."""

    @property
    def needs_entropy(self) -> bool:
        """Whether the model must put `entropy` beside `log_probs`."""
        ...

    def bind(self, mini_batch: TrainBatch) -> LossFn:
        """The loss function of `mini_batch`'s micro-batches."""
        ...


def update_role(
    engine: TrainEngine, objective: Objective, batch: TrainBatch, schedule: UpdateSchedule, *, step: int
) -> Metrics:
    """Make every optimizer step of a role on this batch; returns its metrics by their bare names.

    Each is the mean over the steps, but of *_max the largest and of *_min the smallest.
    """
    rounds = [
        engine.update(
            part,
            objective.bind(part),
            limit=schedule.update_limit,
            with_entropy=objective.needs_entropy,
        )
        for part in iterate_mini_batches(batch, schedule, step=step)
    ]
    return {key.rsplit("/", 1)[-1]: _merge(key, [metrics[key] for metrics in rounds]) for key in rounds[0]}


def _merge(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max"):
        return max(values)
    return min(values) if name.endswith("_min") else sum(values) / len(values)


def iterate_mini_batches(batch: TrainBatch, schedule: UpdateSchedule, *, step: int) -> Iterator[TrainBatch]:
    """Mini-batches of every epoch, in an order that depends on the seed, the step and the epoch alone."""
    for epoch in range(schedule.epochs):
        order = None
        if schedule.shuffle:
            generator = torch.Generator().manual_seed(hash((schedule.seed, step, epoch)) % 2**63)
            order = torch.randperm(len(batch), generator=generator)
        for first in range(0, len(batch), schedule.mini_batch_size):
            part = slice(first, first + schedule.mini_batch_size)
            # Copies of a whole batch take a second where it has 10^8 tokens; without a new order none is needed.
            yield batch.select(part if order is None else order[part])
