"""Settings of KL terms and advantage estimators that another choice leaves without effect."""

from __future__ import annotations

from mrl.config.algorithm import DISCOUNTING_ESTIMATORS, SCALING_ESTIMATORS
from mrl.config.inert_rules.rule import ACTOR, REF, Rule

KL_RULES = (
    Rule(
        keys=("algorithm.kl_ctrl.", "algorithm.kl_penalty"),
        when=lambda config: not config.algorithm.use_kl_in_reward,
        reason="algorithm.use_kl_in_reward is False, so no KL penalty is subtracted from the rewards (early verl "
        "versions did so unless actor.use_kl_loss was set); set algorithm.use_kl_in_reward=True to have it act",
    ),
    Rule(
        keys=("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
        when=lambda config: config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.type == "fixed",
        reason="the coefficient is fixed; set algorithm.kl_ctrl.type=adaptive",
    ),
    Rule(
        keys=(f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"),
        when=lambda config: not config.actor_rollout_ref.actor.use_kl_loss,
        reason=f"{ACTOR}.use_kl_loss is False, so the loss has no KL term; set it to True",
    ),
    Rule(
        keys=(f"{REF}.",),
        when=lambda config: not config.needs_reference,
        reason="no KL term is active, so no reference model is built; set algorithm.use_kl_in_reward=True or "
        f"{ACTOR}.use_kl_loss=True",
        overrides_only=True,
    ),
)
ESTIMATOR_RULES = (
    Rule(
        keys=("critic.", "trainer.max_critic_ckpt_to_keep"),
        when=lambda config: not config.needs_critic,
        reason="advantages are made without values, so no critic is built; set algorithm.adv_estimator=gae",
        overrides_only=True,
    ),
    Rule(
        keys=("algorithm.gamma",),
        when=lambda config: config.algorithm.adv_estimator not in DISCOUNTING_ESTIMATORS,
        reason="algorithm.adv_estimator does not discount; gae and reinforce_plus_plus do",
    ),
    Rule(
        keys=("algorithm.lam",),
        when=lambda config: config.algorithm.adv_estimator != "gae",
        reason="it is a setting of algorithm.adv_estimator=gae",
    ),
    Rule(
        keys=("algorithm.norm_adv_by_std_in_grpo",),
        when=lambda config: config.algorithm.adv_estimator not in SCALING_ESTIMATORS,
        reason="it is a setting of algorithm.adv_estimator=grpo and grpo_passk",
    ),
    Rule(
        keys=("algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches", "data.gen_batch_size"),
        when=lambda config: not config.algorithm.filter_groups.enable,
        reason="every prompt is kept, so a step generates data.train_batch_size prompts at once; set "
        "algorithm.filter_groups.enable=True",
    ),
    Rule(
        keys=("reward.reward_kwargs.",),
        when=lambda config: not config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        reason="long responses are not penalised; set reward.reward_kwargs.overlong_buffer_cfg.enable=True",
    ),
    Rule(
        keys=("reward.reward_manager.name",),
        when=lambda config: True,
        reason="there is one way of calling reward functions; reward.reward_kwargs.overlong_buffer_cfg.enable alone "
        "turns DAPO's penalty on",
    ),
)
