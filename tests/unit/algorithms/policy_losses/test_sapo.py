"""SAPO: a gate that fades with the distance of the ratio from 1."""

from math import exp, log

import pytest

from mrl.algorithms.policy_losses.sapo import SAPO

LOSS = SAPO(tau_pos=1.0, tau_neg=2.0)


def gate(ratio: float, tau: float) -> float:
    return 4 / tau / (1 + exp(-tau * (ratio - 1)))


def test_tokens_by_hand(evaluate):
    ratios, advantages, taus = [1.0, 1.0, 3.0, 3.0], [2.0, -2.0, 1.0, -1.0], [1.0, 2.0, 1.0, 2.0]
    found = evaluate(LOSS, [[log(r) for r in ratios]], [advantages])
    # At r = 1 the gate is 2 / tau and its derivative 1, whatever tau.
    assert found.losses[0][:2] == pytest.approx([-4.0, 2.0])
    assert found.gradient[0][:2] == pytest.approx([-2.0, 2.0])
    for ratio, advantage, tau, loss, gradient in zip(
        ratios, advantages, taus, *found.losses, *found.gradient, strict=True
    ):
        assert loss == pytest.approx(-gate(ratio, tau) * advantage)
        slope = (gate(ratio + 1e-6, tau) - gate(ratio - 1e-6, tau)) / 2e-6
        assert gradient == pytest.approx(-slope * ratio * advantage, rel=1e-6)
    # The larger temperature has faded further.
    assert abs(found.gradient[0][3]) < abs(found.gradient[0][2])


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="tau_neg = 0"):
        SAPO(tau_neg=0)
