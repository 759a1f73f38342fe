"""The plain policy gradient."""

import pytest

from mrl.algorithms.policy_losses.gpg import GPG


def test_gradient_is_the_negative_advantage_whatever_the_ratio(evaluate):
    found = evaluate(GPG(), [[0.0, 3.0, -3.0]], [[1.0, -2.0, 0.5]], old=[[-1.0, -4.0, -0.5]])
    assert found.gradient == [[-1.0, 2.0, -0.5]]
    assert found.losses[0] == pytest.approx([1.0, -2.0, 1.75])
    assert found.fractions == {}
