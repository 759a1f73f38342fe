"""GMPO: the geometric mean of pessimistically clipped ratios."""

from math import exp, log

import pytest
import torch

from mrl.algorithms.masking import masked_mean
from mrl.algorithms.policy_losses.geo_mean import GeoMean

LOSS = GeoMean(clip_ratio_low=0.4, clip_ratio_high=0.4)


def test_sequences_by_hand(evaluate):
    log_ratio = [[1.0, -1.0, 9.0], [1.0, -1.0, 9.0]]
    found = evaluate(LOSS, log_ratio, [[2.0, 2.0, 0.0], [-2.0, -2.0, 0.0]], mask=[[1, 1, 0], [1, 1, 0]])
    # A > 0: 1 is bounded to 0.4, -1 stays: exp(-0.3). A < 0: 1 stays, -1 is bounded to -0.4: exp(0.3).
    assert found.ratio[0] == pytest.approx([exp(-0.3)] * 3)
    assert found.losses[0] == pytest.approx([-2 * exp(-0.3)] * 3)
    assert found.losses[1] == pytest.approx([2 * exp(0.3)] * 3)
    # The two tokens' losses are one loss twice: its gradient, -A s / 2, twice; none for the bounded token.
    assert found.gradient[0] == pytest.approx([0.0, -2 * exp(-0.3), 0.0])
    assert found.gradient[1] == pytest.approx([2 * exp(0.3), 0.0, 0.0])
    assert found.fractions["clip_fraction"] == [[True, True, False], [False, False, False]]
    assert found.fractions["clip_fraction_lower"] == [[False, False, False], [True, True, False]]


def test_equals_a_slow_product_of_ratios(evaluate):
    generator = torch.Generator().manual_seed(4)
    log_ratio = torch.randn(20, 6, generator=generator, dtype=torch.float64).tolist()
    signs = torch.randn(20, generator=generator, dtype=torch.float64).tolist()
    found = evaluate(LOSS, log_ratio, [[sign] * 6 for sign in signs])
    for row, advantage, losses in zip(log_ratio, signs, found.losses, strict=True):
        product = 1.0
        for drift in row:
            bounded = min(max(drift, -0.4), 0.4)
            product *= exp(min(drift, bounded) if advantage > 0 else max(drift, bounded))
        assert losses == pytest.approx([-advantage * product ** (1 / 6)] * 6, rel=1e-12)


def test_weights_combine_to_their_geometric_mean():
    weights = torch.tensor([[4.0, 1.0, 0.0], [0.5, 0.5, 0.5]])
    combined = LOSS.combine_weights(weights, torch.tensor([[True, True, False], [True, True, True]]))
    assert combined.tolist() == [pytest.approx([2.0] * 3), pytest.approx([0.5] * 3)]


def test_the_mini_batch_is_the_mean_over_its_sequences():
    assert GeoMean.loss_agg_mode == "seq-mean-token-mean"
    assert float(masked_mean(torch.tensor([log(2.0)] * 2), torch.tensor([True, True]))) == pytest.approx(log(2.0))


def test_negative_ranges_are_refused():
    with pytest.raises(ValueError, match="clip_ratio_low = -1"):
        GeoMean(clip_ratio_low=-1)
