"""Settings of rollouts, data and the run that another choice leaves without effect."""

from __future__ import annotations

from mrl.config.inert_rules.rule import ACTOR, ROLLOUT, Rule
from mrl.config.schema import PPOConfig


def _clip_ratio_unused(config: PPOConfig) -> bool:
    actor = config.actor_rollout_ref.actor
    return actor.clip_ratio not in (actor.clip_ratio_low, actor.clip_ratio_high)


_ONE_HOST = "trainer.nnodes is 1, so there is no other host"

ROLLOUT_RULES = (
    Rule(
        keys=(f"{ROLLOUT}.calculate_log_probs",),
        when=lambda config: not config.actor_rollout_ref.rollout.calculate_log_probs,
        reason="engines always return log-probs, and every step compares them with the trainer's",
    ),
    Rule(
        keys=(f"{ROLLOUT}.mode",),
        when=lambda config: True,
        reason="engines run in-process and are fed from one queue, whatever the mode",
    ),
    Rule(
        keys=(f"{ROLLOUT}.load_format",),
        when=lambda config: config.actor_rollout_ref.rollout.load_format != "dummy",
        reason="the actor's weights replace whatever the engine loaded before the first rollout; leave it at dummy",
    ),
    Rule(
        keys=tuple(f"{ROLLOUT}.multi_turn.{key}" for key in ("max_assistant_turns", "max_turn_length", "environment.")),
        when=lambda config: not config.actor_rollout_ref.rollout.multi_turn.enable,
        reason=f"the model answers once; set {ROLLOUT}.multi_turn.enable=True",
    ),
    Rule(
        keys=(f"{ROLLOUT}.enable_rollout_routing_replay",),
        when=lambda config: (
            config.actor_rollout_ref.rollout.enable_rollout_routing_replay and not config.replays_routers
        ),
        reason=f"{ACTOR}.megatron.router_replay.mode is disabled; set it to R3",
    ),
)
RUN_RULES = (
    Rule(
        keys=("trainer.balance_batch",),
        when=lambda config: not config.trainer.balance_batch,
        reason="samples are always dealt out to data-parallel ranks by token count",
    ),
    Rule(
        keys=(
            f"{ROLLOUT}.val_kwargs.",
            "data.val_batch_size",
            "data.val_max_samples",
            "trainer.log_val_generations",
            "trainer.validation_data_dir",
        ),
        when=lambda config: not config.trainer.validates,
        reason="the run does not validate; set trainer.val_before_train=True or trainer.test_freq",
    ),
    Rule(
        keys=("data.seed",),
        when=lambda config: not config.data.shuffle,
        reason="data.shuffle is False",
    ),
    Rule(
        keys=("data.truncation",),
        when=lambda config: config.data.filter_overlong_prompts,
        reason="data.filter_overlong_prompts is True, so no over-long prompt is left to truncate",
    ),
    Rule(
        keys=("data.return_raw_chat",),
        when=lambda config: not config.data.return_raw_chat,
        reason="the chat messages are kept with every prompt",
    ),
    Rule(
        keys=("reward.custom_reward_function.name", "reward.custom_reward_function.reward_kwargs"),
        when=lambda config: config.reward.custom_reward_function.path is None,
        reason="reward.custom_reward_function.path is null, so it names no function",
    ),
    Rule(
        keys=("reward.reward_model.",),
        when=lambda config: not config.reward.reward_model.enable,
        reason="reward.reward_model.enable is False, so no reward model is built",
    ),
    Rule(
        keys=("reward.judge.",),
        when=lambda config: config.reward.judge.url is None,
        reason="reward.judge.url is null, so no judge is asked",
    ),
    Rule(
        keys=("reward.sandbox", "reward.pass_environment"),
        when=lambda config: not config.reward.parts,
        reason="no function and no verifier scores, only models do",
    ),
    Rule(
        keys=("reward.verifiers",),
        when=lambda config: all(part.path or part.verifier for part in config.reward.parts.values()),
        reason="no reward is left to the verifier of each sample's data source",
    ),
    Rule(
        keys=("trainer.default_hdfs_dir",),
        when=lambda config: config.trainer.default_hdfs_dir is not None,
        reason="nothing is copied to HDFS; outputs are in trainer.default_local_dir",
    ),
    Rule(
        keys=(
            *(f"{role}.checkpoint.{key}" for role in (ACTOR, "critic") for key in ("save_contents", "async_save")),
            "trainer.max_actor_ckpt_to_keep",
            "trainer.max_critic_ckpt_to_keep",
        ),
        when=lambda config: config.trainer.save_freq <= 0 or config.trainer.val_only,
        reason="the run saves no checkpoint; set trainer.save_freq (above the number of steps it saves the last only)",
    ),
    Rule(
        keys=(f"{ACTOR}.checkpoint.load_contents", "critic.checkpoint.load_contents"),
        when=lambda config: config.trainer.resume_mode == "disable",
        reason="trainer.resume_mode is disable, so no checkpoint is loaded",
    ),
    Rule(
        keys=("trainer.resume_from_path",),
        when=lambda config: config.trainer.resume_mode != "resume_path",
        reason="trainer.resume_mode is not resume_path",
    ),
    Rule(
        keys=("trainer.network_interface", "trainer.reshard_timeout_s"),
        when=lambda config: config.trainer.nnodes == 1,
        reason=_ONE_HOST,
    ),
    Rule(
        keys=("trainer.ray_wait_register_center_timeout",),
        when=lambda config: config.trainer.nnodes == 1 and config.trainer.launcher not in ("auto", "ray"),
        reason=_ONE_HOST,
    ),
    Rule(
        keys=("trainer.profile_ranks",),
        when=lambda config: not config.trainer.profile_steps,
        reason="trainer.profile_steps names no step",
    ),
    Rule(
        keys=("trainer.profile_steps",),
        when=lambda config: config.trainer.val_only,
        reason="trainer.val_only is True, so no step is made",
    ),
    Rule(
        keys=("ray_kwargs.",),
        when=lambda config: config.trainer.launcher not in ("auto", "ray"),
        reason="trainer.launcher is not ray",
    ),
    Rule(
        keys=(f"{ACTOR}.clip_ratio",),
        when=_clip_ratio_unused,
        reason=f"{ACTOR}.clip_ratio_low and clip_ratio_high are both set and take precedence",
    ),
)
RAY_RULES = (
    Rule(keys=("ray_kwargs.",), when=lambda config: True, reason="the job does not run on Ray"),
    Rule(
        keys=("trainer.ray_wait_register_center_timeout",),
        when=lambda config: config.trainer.nnodes == 1,
        reason=_ONE_HOST,
    ),
)
"""Of a job that turns out to run without Ray."""
