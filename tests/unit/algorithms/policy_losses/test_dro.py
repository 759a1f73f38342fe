"""DRO: the policy gradient with a quadratic hold."""

import pytest

from mrl.algorithms.policy_losses.dro import DRO


def test_tokens_by_hand(evaluate):
    found = evaluate(DRO(dro_beta=0.5), [[0.0, 2.0, -2.0]], [[1.0, 1.0, -1.0]], old=[[-1.0, -3.0, -1.0]])
    # -(A log_prob - 0.25 d^2), and by log-prob -(A - 0.5 d).
    assert found.losses[0] == pytest.approx([1.0, 2.0, -2.0])
    assert found.gradient[0] == pytest.approx([-1.0, 0.0, 0.0])


def test_the_hold_has_no_default():
    with pytest.raises(ValueError, match="dro_beta = None must be positive"):
        DRO()
