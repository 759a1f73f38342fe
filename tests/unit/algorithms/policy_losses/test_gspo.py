"""GSPO: one ratio for a sequence, a gradient for every token."""

from math import exp, log

import pytest
import torch

from mrl.algorithms.policy_losses.gspo import GSPO

LOSS = GSPO(clip_ratio_low=0.2, clip_ratio_high=0.3)


def test_sequences_by_hand(evaluate):
    # Geometric means over trained tokens: sqrt(2 * 0.5) = 1, sqrt(4 * 1) = 2 (the masked 100 does not count).
    log_ratio = [[log(2), log(0.5), 0.0], [log(4), log(100), 0.0]]
    found = evaluate(LOSS, log_ratio, [[3.0, 3.0, 0.0], [1.0, 1.0, -1.0]], mask=[[1, 1, 0], [1, 0, 1]])
    assert found.ratio[0] == pytest.approx([1.0, 1.0, 1.0])
    assert found.ratio[1] == pytest.approx([2.0, 2.0, 2.0])
    # First: -1 * 3 each. Second: clipped at 1.3 where A > 0, not where A < 0.
    assert found.losses[0][:2] == pytest.approx([-3.0, -3.0])
    assert found.losses[1] == pytest.approx([-1.3, -1.3, 2.0])
    assert found.gradient[0] == pytest.approx([-3.0, -3.0, 0.0])
    assert found.gradient[1] == pytest.approx([0.0, 0.0, 2.0])
    assert found.fractions["clip_fraction"][1] == [True, True, False]


def test_equals_the_papers_sequence_objective_and_its_gradient(evaluate):
    """Mean over sequences of min(s A, clip(s) A) with s differentiated as what it is, a function of all tokens."""
    generator = torch.Generator().manual_seed(3)
    log_ratio = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(30, 1, generator=generator, dtype=torch.float64).expand(30, 5)
    leaf, total = log_ratio.clone().requires_grad_(), 0.0
    for row, advantage in zip(leaf, advantages[:, 0], strict=True):
        ratio = (sum(row) / 5).exp()
        total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    total.backward()
    found = evaluate(LOSS, log_ratio.tolist(), advantages.tolist())
    # seq-mean-token-mean of the token losses, times 30 sequences.
    assert sum(sum(row) / 5 for row in found.losses) == pytest.approx(total.item(), abs=1e-12)
    torch.testing.assert_close(torch.tensor(found.gradient, dtype=torch.float64) / 5, leaf.grad, rtol=0, atol=1e-12)
    assert 0 < sum(row[0] for row in found.fractions["clip_fraction"]) < 30


def test_a_runaway_sequence_stays_finite(evaluate):
    found = evaluate(LOSS, [[300.0, 300.0]], [[-1.0, -1.0]])
    assert found.losses[0] == pytest.approx([exp(10.0)] * 2)
    assert found.gradient == [[0.0, 0.0]]
