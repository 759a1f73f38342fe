"""From configuration sections to the plain values that the loop and its stages take."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from mrl.algorithms.estimators import EstimatorSettings, build_estimator
from mrl.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.algorithms.policy_losses import PolicyLoss, build_policy_loss
from mrl.algorithms.policy_losses.gpg import GPG
from mrl.algorithms.rollout_correction import Divergence, Rejection, RolloutCorrection, Scope, Weighting
from mrl.config.algorithm import GREEDY_ESTIMATORS, KLCtrlConfig
from mrl.config.rollout_correction import Bounds, RolloutCorrectionConfig
from mrl.config.schema import PPOConfig
from mrl.launch.watchdog import Deadlines
from mrl.rewards.overlong import OverlongPenalty
from mrl.trainer.advantages import AdvantageStage
from mrl.trainer.correction import CorrectionStage
from mrl.trainer.group_filter import GroupFilter
from mrl.trainer.ppo import LoopSettings
from mrl.types import SamplingParams


def loop_settings(config: PPOConfig, total_steps: int) -> LoopSettings:
    """When the loop does what."""
    trainer = config.trainer
    return LoopSettings(
        critic_warmup=trainer.critic_warmup,
        total_steps=total_steps,
        test_freq=trainer.test_freq,
        val_before_train=trainer.val_before_train,
        val_only=trainer.val_only,
    )


def phase_deadlines(config: PPOConfig) -> Deadlines:
    """How long each phase may take."""
    return Deadlines(default_s=config.trainer.phase_timeout_s, of_phase_s=config.trainer.phase_timeouts_s)


def train_sampling(config: PPOConfig, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """How training samples are drawn."""
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        max_new_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=() if rollout.ignore_eos else eos_token_ids,
        ignore_eos=rollout.ignore_eos,
        return_routed_experts=config.replays_routers,
    )


def baseline_sampling(config: PPOConfig, eos_token_ids: tuple[int, ...]) -> SamplingParams | None:
    """How the greedy response to each prompt is drawn, where the advantages need it."""
    if config.algorithm.adv_estimator not in GREEDY_ESTIMATORS:
        return None
    sampling = train_sampling(config, eos_token_ids)
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, return_routed_experts=False)


def val_sampling(config: PPOConfig, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """How validation samples are drawn."""
    settings = config.actor_rollout_ref.rollout.val_kwargs
    return SamplingParams(
        max_new_tokens=config.data.max_response_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_token_ids=eos_token_ids,
    )


def policy_objective(config: PPOConfig) -> PolicyObjective:
    """What the actor minimises."""
    correction = config.algorithm.rollout_correction
    actor = config.actor_rollout_ref.actor
    return PolicyObjective(
        policy_loss=_policy_loss(config),
        correction=rollout_correction(correction) if correction.bypass_mode else None,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        entropy_coeff=actor.entropy_coeff,
        use_kl_loss=actor.use_kl_loss,
        kl_loss_coef=actor.kl_loss_coef,
        kl_loss_type=actor.kl_loss_type,
    )


def correction_stage(config: PPOConfig) -> CorrectionStage:
    """What is made of the mismatch between trainer and engine before advantages are computed."""
    settings = config.algorithm.rollout_correction
    return CorrectionStage(correction=rollout_correction(settings), bypass_mode=settings.bypass_mode)


def rollout_correction(settings: RolloutCorrectionConfig) -> RolloutCorrection:
    """Weights and rejection by their settings."""
    bounds = settings.weight_bounds
    return RolloutCorrection(
        weighting=_weighting(settings),
        rejections=tuple(_rejection(name, bounds) for name, bounds in settings.rejections),
        ratio_bounds=(bounds.lower or 1 / bounds.upper, bounds.upper),
    )


def _weighting(settings: RolloutCorrectionConfig) -> Weighting | None:
    # In bypass mode PPO's ratio is that of trainer to engine already.
    if settings.rollout_is is None or (settings.bypass_mode and settings.loss_type == "ppo_clip"):
        return None
    lower, upper = settings.weight_bounds
    return Weighting(
        level=settings.rollout_is, upper=upper, lower=lower, batch_normalize=settings.rollout_is_batch_normalize
    )


def _rejection(name: str, bounds: Bounds) -> Rejection:
    scope, _, divergence = name.rpartition("_")
    return Rejection(
        scope=cast(Scope, scope), divergence=cast(Divergence, divergence), lower=bounds.lower, upper=bounds.upper
    )


def _policy_loss(config: PPOConfig) -> PolicyLoss:
    correction = config.algorithm.rollout_correction
    if correction.bypass_mode and correction.loss_type == "reinforce":
        return GPG()
    actor = config.actor_rollout_ref.actor
    settings = actor.policy_loss
    return build_policy_loss(
        settings.loss_mode,
        {
            "clip_ratio_low": actor.clip_ratio_low,
            "clip_ratio_high": actor.clip_ratio_high,
            "clip_ratio_c": actor.clip_ratio_c,
            "tau_pos": actor.tau_pos,
            "tau_neg": actor.tau_neg,
            "clip_cov_ratio": settings.clip_cov_ratio,
            "clip_cov_lb": settings.clip_cov_lb,
            "clip_cov_ub": settings.clip_cov_ub,
            "kl_cov_ratio": settings.kl_cov_ratio,
            "ppo_kl_coef": settings.ppo_kl_coef,
            "dro_beta": settings.dro_beta,
        },
    )


def value_objective(config: PPOConfig) -> ValueObjective:
    """What the critic minimises."""
    critic = config.critic
    return ValueObjective(
        cliprange_value=critic.cliprange_value,
        loss_agg_mode=critic.loss_agg_mode,
        loss_scale_factor=critic.loss_scale_factor or config.data.max_response_length,
    )


def group_filter(config: PPOConfig) -> GroupFilter | None:
    """Which prompts a step keeps, where not all of them."""
    settings = config.algorithm.filter_groups
    if not settings.enable:
        return None
    return GroupFilter(metric=settings.metric, max_num_gen_batches=settings.max_num_gen_batches)


def overlong_penalty(config: PPOConfig) -> OverlongPenalty | None:
    """The penalty on long responses, if there is one."""
    settings = config.reward.reward_kwargs
    buffer = settings.overlong_buffer_cfg
    if not buffer.enable:
        return None
    return OverlongPenalty(
        max_resp_len=settings.max_resp_len or config.data.max_response_length,
        buffer_len=buffer.len,
        penalty_factor=buffer.penalty_factor,
        log=buffer.log,
    )


def advantage_stage(config: PPOConfig) -> AdvantageStage:
    """From scores to advantages."""
    algorithm = config.algorithm
    settings = EstimatorSettings(
        gamma=algorithm.gamma, lam=algorithm.lam, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo
    )
    return AdvantageStage(
        estimator=build_estimator(algorithm.adv_estimator, settings),
        n_samples_per_prompt=config.actor_rollout_ref.rollout.n,
        kl_penalty=algorithm.kl_penalty,
        kl_controller=_kl_controller(algorithm.kl_ctrl) if algorithm.use_kl_in_reward else None,
    )


def _kl_controller(settings: KLCtrlConfig) -> KLController:
    if settings.type == "adaptive":
        return AdaptiveKLController(settings.kl_coef, target_kl=settings.target_kl, horizon=settings.horizon)
    return FixedKLController(settings.kl_coef)
