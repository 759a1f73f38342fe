"""Advantage estimators by their name in `algorithm.adv_estimator`: one file each."""

from __future__ import annotations

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages, Estimator
from mrl.algorithms.estimators.gae import GAE

__all__ = ["AdvantageInputs", "Advantages", "Estimator", "build_estimator"]


def build_estimator(name: str, *, gamma: float, lam: float) -> Estimator:
    """The named estimator.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "gae":
        return GAE(gamma=gamma, lam=lam)
    raise ValueError(f"algorithm.adv_estimator = {name!r} is unknown; known: gae")
