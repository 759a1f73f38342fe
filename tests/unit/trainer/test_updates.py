"""What a role's optimizer steps on one batch report together, and the mini-batches that they see."""

import pytest
import torch

from mrl.trainer.updates import UpdateSchedule, iterate_mini_batches, update_role
from mrl.types import MicroBatchLimit, TrainBatch

LIMIT = MicroBatchLimit(samples=2)


class Recorder:
    """An engine and an objective that remember what they were given."""

    needs_entropy = False

    def __init__(self, *reports):
        self.reports = list(reports)
        self.seen = []

    def bind(self, mini_batch):
        return lambda output, batch: (output, {})

    def update(self, part, loss_fn, *, limit, with_entropy):
        assert limit is LIMIT
        self.seen.append(part.lengths.tolist())
        return self.reports[len(self.seen) - 1]


def batch_of(*lengths):
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return TrainBatch(tokens=tokens, lengths=torch.tensor(lengths), loss_mask=tokens.bool())


def schedule_of(**options):
    settings = {"mini_batch_size": 2, "epochs": 1, "shuffle": False, "seed": 1} | options
    return UpdateSchedule(update_limit=LIMIT, forward_limit=LIMIT, **settings)


def test_means_are_averaged_over_the_steps_and_extremes_are_kept():
    engine = Recorder(
        {"actor/loss": 1.0, "actor/ratio_max": 4.0, "actor/rollout_is_min": 0.5},
        {"actor/loss": 3.0, "actor/ratio_max": 2.0, "actor/rollout_is_min": 0.25},
    )
    metrics = update_role(engine, engine, batch_of(1, 2, 3, 4), schedule_of(), step=1)
    assert metrics == {"loss": 2.0, "ratio_max": 4.0, "rollout_is_min": 0.25}
    assert engine.seen == [[1, 2], [3, 4]]


def test_every_epoch_sees_every_sample_in_an_order_of_its_own_that_is_the_same_again():
    schedule = schedule_of(epochs=2, shuffle=True, mini_batch_size=8)

    def orders(step):
        return [part.lengths.tolist() for part in iterate_mini_batches(batch_of(*range(1, 9)), schedule, step=step)]

    assert [sorted(order) for order in orders(3)] == [list(range(1, 9))] * 2
    assert orders(3)[0] != orders(3)[1]
    assert orders(3) == orders(3)
    assert orders(3) != orders(4)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_mini_batch_size_that_divides_nothing_leaves_a_smaller_last_one(size):
    parts = list(iterate_mini_batches(batch_of(1, 2, 3, 4), schedule_of(mini_batch_size=size), step=1))
    assert [length for part in parts for length in part.lengths.tolist()] == [1, 2, 3, 4]
    assert len(parts) == -(-4 // size)
