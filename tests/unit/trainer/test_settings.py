"""What configuration sections become."""

from __future__ import annotations

from typing import get_args

import pytest

from mrl.algorithms.estimators import ESTIMATORS
from mrl.algorithms.estimators.grpo import GRPO
from mrl.algorithms.estimators.reinforce_plus_plus import ReinforcePlusPlus
from mrl.config.algorithm import (
    CRITIC_ESTIMATORS,
    DISCOUNTING_ESTIMATORS,
    GREEDY_ESTIMATORS,
    GROUP_ESTIMATORS,
    SCALING_ESTIMATORS,
    AdvEstimator,
)
from mrl.config.load import load_config
from mrl.trainer.settings import advantage_stage


def test_the_configuration_offers_exactly_the_estimators_there_are():
    assert set(get_args(AdvEstimator)) == set(ESTIMATORS)
    special = (CRITIC_ESTIMATORS, DISCOUNTING_ESTIMATORS, GREEDY_ESTIMATORS, GROUP_ESTIMATORS, SCALING_ESTIMATORS)
    assert set().union(*special) <= set(ESTIMATORS)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.9"], ReinforcePlusPlus(gamma=0.9)),
        (
            ["algorithm.adv_estimator=grpo", "algorithm.norm_adv_by_std_in_grpo=False"],
            GRPO(norm_adv_by_std_in_grpo=False),
        ),
    ],
)
def test_an_estimator_gets_its_settings(overrides, expected):
    stage = advantage_stage(load_config([*overrides, "actor_rollout_ref.rollout.n=3"]))
    assert stage.estimator == expected
    assert stage.n_samples_per_prompt == 3
