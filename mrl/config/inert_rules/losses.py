"""Settings of policy losses and rollout correction that another choice leaves without effect."""

from __future__ import annotations

from mrl.config.actor import SEQUENCE_MEAN_LOSSES
from mrl.config.inert_rules.rule import ACTOR, Rule
from mrl.config.rollout_correction import RolloutCorrectionConfig
from mrl.config.schema import PPOConfig

_RATIO_LOSSES = frozenset({"vanilla", "gspo", "cispo", "clip_cov", "geo_mean", "dppo_tv", "dppo_kl"})
LOSS_SETTINGS = {
    "clip_ratio": _RATIO_LOSSES,
    "clip_ratio_low": _RATIO_LOSSES,
    "clip_ratio_high": _RATIO_LOSSES,
    "clip_ratio_c": frozenset({"vanilla", "dppo_tv", "dppo_kl"}),
    "tau_pos": frozenset({"sapo"}),
    "tau_neg": frozenset({"sapo"}),
    "policy_loss.clip_cov_ratio": frozenset({"clip_cov"}),
    "policy_loss.clip_cov_lb": frozenset({"clip_cov"}),
    "policy_loss.clip_cov_ub": frozenset({"clip_cov"}),
    "policy_loss.kl_cov_ratio": frozenset({"kl_cov"}),
    "policy_loss.ppo_kl_coef": frozenset({"kl_cov"}),
    "policy_loss.dro_beta": frozenset({"dro"}),
}
"""The policy losses that take each of the actor's settings of losses."""


def _loss_rule(losses: frozenset[str]) -> Rule:
    return Rule(
        keys=tuple(f"{ACTOR}.{key}" for key, takers in LOSS_SETTINGS.items() if takers == losses),
        when=lambda config: _loss_in_use(config) not in losses,
        reason=f"only {ACTOR}.policy_loss.loss_mode={', '.join(sorted(losses))} takes it",
    )


def _aggregates_nothing(config: PPOConfig) -> bool:
    """The actor's aggregation acts on neither a loss term nor the critic, which follows it unless set."""
    actor = config.actor_rollout_ref.actor
    followed = config.needs_critic and config.critic.loss_agg_mode == actor.loss_agg_mode
    has_own = actor.policy_loss.loss_mode in SEQUENCE_MEAN_LOSSES
    return has_own and not (followed or actor.use_kl_loss or actor.entropy_coeff != 0)


_CORRECTION = "algorithm.rollout_correction"
CORRECTION_RULES = (
    Rule(
        keys=(f"{_CORRECTION}.loss_type",),
        when=lambda config: not config.algorithm.rollout_correction.bypass_mode,
        reason=f"{_CORRECTION}.bypass_mode is False, so {ACTOR}.policy_loss.loss_mode is the loss",
    ),
    Rule(
        keys=(f"{_CORRECTION}.rollout_is",),
        when=lambda config: _weighs_nothing(config.algorithm.rollout_correction),
        reason="in bypass_mode the ratio of PPO's clipped loss is that of trainer to engine already; set "
        f"{_CORRECTION}.loss_type=reinforce",
    ),
    Rule(
        keys=(f"{_CORRECTION}.rollout_is_batch_normalize",),
        when=lambda config: config.algorithm.rollout_correction.rollout_is is None,
        reason=f"{_CORRECTION}.rollout_is is null, so there are no weights",
    ),
    Rule(
        keys=(f"{_CORRECTION}.rollout_rs_threshold",),
        when=lambda config: config.algorithm.rollout_correction.rollout_rs is None,
        reason=f"{_CORRECTION}.rollout_rs is null, so nothing is rejected",
    ),
)


def _weighs_nothing(settings: RolloutCorrectionConfig) -> bool:
    return settings.bypass_mode and settings.loss_type == "ppo_clip"


def _loss_in_use(config: PPOConfig) -> str:
    correction = config.algorithm.rollout_correction
    reinforces = correction.bypass_mode and correction.loss_type == "reinforce"
    return "gpg" if reinforces else config.actor_rollout_ref.actor.policy_loss.loss_mode


LOSS_RULES = (
    *(_loss_rule(losses) for losses in dict.fromkeys(LOSS_SETTINGS.values())),
    Rule(
        keys=(f"{ACTOR}.loss_agg_mode",),
        when=_aggregates_nothing,
        reason=f"{ACTOR}.policy_loss.loss_mode={', '.join(sorted(SEQUENCE_MEAN_LOSSES))} always take "
        "seq-mean-token-mean, and the loss has no other term",
    ),
)
