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
from mrl.rewards.overlong import OverlongPenalty
from mrl.trainer.group_filter import GroupFilter
from mrl.trainer.settings import (
    advantage_stage,
    baseline_sampling,
    group_filter,
    overlong_penalty,
    train_sampling,
    val_sampling,
)


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


def test_only_remax_has_a_greedy_response_drawn():
    assert baseline_sampling(load_config([]), (2,)) is None
    config = load_config(["algorithm.adv_estimator=remax", "actor_rollout_ref.rollout.top_p=0.5"])
    sampling = baseline_sampling(config, (2,))
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.stop_token_ids) == (0, 1, 512, (2,))


def test_experts_are_reported_of_the_samples_that_are_trained_on():
    replay = "actor_rollout_ref.actor.megatron.router_replay.mode=R3"
    config = load_config([replay, "algorithm.adv_estimator=remax"])
    assert train_sampling(config, (2,)).return_routed_experts
    assert not train_sampling(load_config([]), (2,)).return_routed_experts
    baseline = baseline_sampling(config, (2,))
    assert baseline is not None
    assert not baseline.return_routed_experts
    assert not val_sampling(config, (2,)).return_routed_experts


def test_a_response_of_full_length_has_no_token_to_stop_at():
    assert train_sampling(load_config([]), (2,)).stop_token_ids == (2,)
    endless = train_sampling(load_config(["actor_rollout_ref.rollout.ignore_eos=True"]), (2,))
    assert endless.ignore_eos
    assert endless.stop_token_ids == ()


def test_dynamic_sampling_and_the_penalty_on_length_take_verls_keys():
    config = load_config([])
    assert group_filter(config) is overlong_penalty(config) is None
    config = load_config(
        [
            "actor_rollout_ref.rollout.n=2",
            "algorithm.filter_groups={enable:True,metric:acc,max_num_gen_batches:10}",
            "data.gen_batch_size=1536",
            "reward.reward_manager.name=dapo",
            "+reward.reward_kwargs.overlong_buffer_cfg.enable=True",
            "+reward.reward_kwargs.overlong_buffer_cfg.len=64",
            "reward_model.overlong_buffer.penalty_factor=0.5",
        ]
    )
    assert group_filter(config) == GroupFilter(metric="acc", max_num_gen_batches=10)
    assert config.gen_batch_size == 1536
    assert overlong_penalty(config) == OverlongPenalty(max_resp_len=512, buffer_len=64, penalty_factor=0.5, log=False)
