"""From the configuration to the objects of `mrl.algorithms`."""

from dataclasses import fields
from typing import get_args

import pytest

from mrl.algorithms.aggregation import LOSS_AGG_MODES
from mrl.algorithms.kl import KL_KINDS
from mrl.algorithms.policy_losses import POLICY_LOSSES
from mrl.config.actor import CLIP_BELOW_ONE, SEQUENCE_MEAN_LOSSES, KLLossKind, LossAggMode, LossMode
from mrl.config.inert import LOSS_SETTINGS
from mrl.config.load import load_config
from mrl.trainer.settings import policy_objective

ACTOR = "actor_rollout_ref.actor"

SET = {
    "clip_ratio_low": 0.11, "clip_ratio_high": 0.12, "clip_ratio_c": 4.5, "tau_pos": 1.3, "tau_neg": 1.4,
    "policy_loss.clip_cov_ratio": 0.2, "policy_loss.clip_cov_lb": 0.5, "policy_loss.clip_cov_ub": 2.5,
    "policy_loss.kl_cov_ratio": 0.3, "policy_loss.ppo_kl_coef": 0.6, "policy_loss.dro_beta": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("mode", POLICY_LOSSES)
def test_every_policy_loss_gets_its_settings(mode):
    overrides = [f"{ACTOR}.{key}={value}" for key, value in SET.items()]
    loss = policy_objective(load_config([*overrides, f"{ACTOR}.policy_loss.loss_mode={mode}"])).policy_loss
    assert type(loss) is POLICY_LOSSES[mode]
    by_name = {key.rsplit(".", 1)[-1]: value for key, value in SET.items()}
    assert {item.name: getattr(loss, item.name) for item in fields(loss)} == {
        item.name: by_name[item.name] for item in fields(loss)
    }


def test_the_configurations_names_are_those_of_the_algorithms():
    assert get_args(LossMode) == tuple(POLICY_LOSSES)
    assert get_args(LossAggMode) == LOSS_AGG_MODES
    assert set(get_args(KLLossKind)) == set(KL_KINDS)


def test_the_configuration_knows_what_each_loss_takes():
    taken = {
        key.rsplit(".", 1)[-1]: {name for name, loss in POLICY_LOSSES.items() if key.rsplit(".", 1)[-1] in _names(loss)}
        for key in LOSS_SETTINGS
        if key != "clip_ratio"
    }
    assert taken == {key.rsplit(".", 1)[-1]: set(v) for key, v in LOSS_SETTINGS.items() if key != "clip_ratio"}
    assert {n for n, loss in POLICY_LOSSES.items() if loss.loss_agg_mode == "seq-mean-token-mean"} == set(
        SEQUENCE_MEAN_LOSSES
    )
    assert {name for name, loss in POLICY_LOSSES.items() if _refuses_to_clip_below_zero(loss)} == set(CLIP_BELOW_ONE)


def _names(loss):
    return {item.name for item in fields(loss)}


def _refuses_to_clip_below_zero(loss):
    if "clip_ratio_low" not in _names(loss):
        return False
    try:
        loss(clip_ratio_low=1.5)
    except ValueError:
        return True
    return False
