"""From the configuration to the objects of `mrl.algorithms`."""

from dataclasses import fields
from typing import get_args

import pytest

from mrl.algorithms.aggregation import LOSS_AGG_MODES
from mrl.algorithms.kl import KL_KINDS
from mrl.algorithms.policy_losses import POLICY_LOSSES
from mrl.algorithms.policy_losses.gpg import GPG
from mrl.algorithms.policy_losses.vanilla import Vanilla
from mrl.algorithms.rollout_correction import Rejection, RolloutCorrection, Weighting
from mrl.config.actor import CLIP_BELOW_ONE, SEQUENCE_MEAN_LOSSES, KLLossKind, LossAggMode, LossMode
from mrl.config.inert_rules.losses import LOSS_SETTINGS
from mrl.config.load import load_config
from mrl.trainer.correction import CorrectionStage
from mrl.trainer.settings import correction_stage, policy_objective

ACTOR, CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"

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


def test_rollout_correction_gets_its_settings():
    stage = correction_stage(
        load_config([
            f"{CORRECTION}.rollout_is=sequence", f"{CORRECTION}.rollout_is_threshold=0.4_3.0",
            f"{CORRECTION}.rollout_is_batch_normalize=True",
            f"{CORRECTION}.rollout_rs='token_k1,seq_mean_k3'", f"{CORRECTION}.rollout_rs_threshold='0.5_4.0,0.02'",
        ])
    )  # fmt: skip
    assert stage == CorrectionStage(
        correction=RolloutCorrection(
            weighting=Weighting(level="sequence", lower=0.4, upper=3.0, batch_normalize=True),
            rejections=(
                Rejection(scope="token", divergence="k1", lower=0.5, upper=4.0),
                Rejection(scope="seq_mean", divergence="k3", upper=0.02),
            ),
            ratio_bounds=(0.4, 3.0),
        )
    )


def test_one_bound_serves_every_test_and_one_number_is_its_own_reciprocal():
    rules = [f"{CORRECTION}.rollout_rs=[token_k1,seq_max_k2]", f"{CORRECTION}.rollout_rs_threshold=4"]
    assert correction_stage(load_config(rules)).correction.rejections == (
        Rejection(scope="token", divergence="k1", lower=0.25, upper=4.0),
        Rejection(scope="seq_max", divergence="k2", upper=4.0),
    )


@pytest.mark.parametrize(
    ("loss_type", "loss", "weighting"),
    [("ppo_clip", Vanilla(), None), ("reinforce", GPG(), Weighting(level="token", upper=2.0))],
)
def test_bypass_mode_corrects_in_the_objective(loss_type, loss, weighting):
    config = load_config([
        f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type={loss_type}", f"{CORRECTION}.rollout_is=token",
    ])  # fmt: skip
    assert correction_stage(config).bypass_mode
    objective = policy_objective(config)
    assert objective.policy_loss == loss
    assert objective.correction == RolloutCorrection(weighting=weighting)
    assert policy_objective(load_config([])).correction is None


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
