"""Advantage estimators by their name in `algorithm.adv_estimator`: one file each, one line each in `ESTIMATORS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mrl.algorithms.estimators.base import AdvantageInputs, Advantages, Estimator
from mrl.algorithms.estimators.gae import GAE
from mrl.algorithms.estimators.gpg import GPG
from mrl.algorithms.estimators.grpo import GRPO
from mrl.algorithms.estimators.grpo_passk import GRPOPassK
from mrl.algorithms.estimators.opo import OPO
from mrl.algorithms.estimators.reinforce_plus_plus import ReinforcePlusPlus
from mrl.algorithms.estimators.reinforce_plus_plus_baseline import ReinforcePlusPlusBaseline
from mrl.algorithms.estimators.remax import ReMax
from mrl.algorithms.estimators.rloo import RLOO

__all__ = ["ESTIMATORS", "AdvantageInputs", "Advantages", "Estimator", "EstimatorSettings", "build_estimator"]


@dataclass(kw_only=True, frozen=True)
class EstimatorSettings:
    """The keys of section `algorithm` that estimators read; each takes those it has a use for."""

    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True


ESTIMATORS: Mapping[str, Callable[[EstimatorSettings], Estimator]] = {
    "gae": lambda settings: GAE(gamma=settings.gamma, lam=settings.lam),
    "gpg": lambda settings: GPG(),
    "grpo": lambda settings: GRPO(norm_adv_by_std_in_grpo=settings.norm_adv_by_std_in_grpo),
    "grpo_passk": lambda settings: GRPOPassK(norm_adv_by_std_in_grpo=settings.norm_adv_by_std_in_grpo),
    "grpo_vectorized": lambda settings: GRPO(norm_adv_by_std_in_grpo=settings.norm_adv_by_std_in_grpo),
    "opo": lambda settings: OPO(),
    "reinforce_plus_plus": lambda settings: ReinforcePlusPlus(gamma=settings.gamma),
    "reinforce_plus_plus_baseline": lambda settings: ReinforcePlusPlusBaseline(),
    "remax": lambda settings: ReMax(),
    "rloo": lambda settings: RLOO(),
    "rloo_vectorized": lambda settings: RLOO(),
}


def build_estimator(name: str, settings: EstimatorSettings) -> Estimator:
    """The named estimator.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"algorithm.adv_estimator = {name!r} is unknown; known: {', '.join(sorted(ESTIMATORS))}")
    return ESTIMATORS[name](settings)
