"""The selection that clip_cov and kl_cov make over a mini-batch."""

import torch

from mrl.algorithms.policy_losses.covariance import Covariance, token_priority
from mrl.types import TrainBatch


def test_covariance_by_hand():
    batch = TrainBatch(
        tokens=torch.zeros(1, 4, dtype=torch.long),
        lengths=torch.tensor([4]),
        loss_mask=torch.tensor([[True, True, True, False]]),
        old_log_probs=torch.tensor([[-1.0, -2.0, -3.0, 50.0]]),
        advantages=torch.tensor([[2.0, 0.0, 1.0, 50.0]]),
    )
    covariance = Covariance.of(batch)
    assert covariance == (1.0, -2.0)
    found = covariance.compute(batch.required("advantages"), batch.required("old_log_probs"))
    assert found[0, :3].tolist() == [1.0, 0.0, 0.0]


def test_priority_depends_on_a_token_and_those_before_it_alone():
    tokens = torch.randint(0, 100, (4, 30), generator=torch.Generator().manual_seed(0))
    priority = token_priority(tokens)
    assert torch.equal(token_priority(tokens[:, :12]), priority[:, :12])
    assert torch.equal(token_priority(tokens.flip(0)), priority.flip(0))
    changed = tokens.clone()
    changed[:, 10] += 1
    same = token_priority(changed) == priority
    assert same[:, :10].all()
    assert not same[:, 10:].any()


def test_priority_is_spread_evenly_over_positions_and_values():
    tokens = torch.randint(0, 5, (400, 50), generator=torch.Generator().manual_seed(1))
    priority = token_priority(tokens)
    prefixes = {tuple(row[: t + 1]) for row in tokens.tolist() for t in range(50)}
    assert priority.unique().numel() == len(prefixes)
    smallest = priority[:, 10:].flatten().argsort()[:2000]
    counts = torch.bincount(smallest % 40, minlength=40)
    # 50 each with a standard deviation of 7.
    assert int(counts.min()) > 20
    assert int(counts.max()) < 85
    assert (priority >= 0).all()
    assert 0.47 < float((priority < 2**62).double().mean()) < 0.53
