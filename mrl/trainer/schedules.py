"""How many samples each role takes at a time, from the configuration and the role's number of data-parallel ranks."""

from __future__ import annotations

from mrl.config.batch import check_mini_batch, resolve_micro_batch_size
from mrl.config.schema import PPOConfig
from mrl.trainer.updates import UpdateSchedule


def actor_schedule(config: PPOConfig, dp_size: int) -> UpdateSchedule:
    """The actor's mini-batches and micro-batches.

    Raises:
        ConfigError: a size is not set or does not divide.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    micro_batch_size = resolve_micro_batch_size(
        actor.ppo_micro_batch_size_per_gpu,
        actor.ppo_micro_batch_size,
        dp_size,
        key="actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    )
    mini_batch_size = actor.ppo_mini_batch_size * rollout.n
    check_mini_batch(
        path="actor_rollout_ref.actor",
        mini_batch_samples=mini_batch_size,
        micro_batch_size=micro_batch_size,
        dp_size=dp_size,
    )
    return UpdateSchedule(
        mini_batch_size=mini_batch_size,
        micro_batch_size=micro_batch_size,
        forward_micro_batch_size=resolve_micro_batch_size(
            rollout.log_prob_micro_batch_size_per_gpu,
            rollout.log_prob_micro_batch_size,
            dp_size,
            key="actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
        ),
        epochs=actor.ppo_epochs,
        shuffle=actor.shuffle,
        seed=actor.megatron.seed,
    )


def critic_schedule(config: PPOConfig, dp_size: int) -> UpdateSchedule:
    """The critic's mini-batches and micro-batches.

    Raises:
        ConfigError: a size is not set or does not divide.
    """
    critic = config.critic
    micro_batch_size = resolve_micro_batch_size(
        critic.ppo_micro_batch_size_per_gpu,
        critic.ppo_micro_batch_size,
        dp_size,
        key="critic.ppo_micro_batch_size_per_gpu",
    )
    mini_batch_size = critic.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    check_mini_batch(
        path="critic", mini_batch_samples=mini_batch_size, micro_batch_size=micro_batch_size, dp_size=dp_size
    )
    return UpdateSchedule(
        mini_batch_size=mini_batch_size,
        micro_batch_size=micro_batch_size,
        forward_micro_batch_size=micro_batch_size,
        epochs=critic.ppo_epochs,
        shuffle=critic.shuffle,
        seed=critic.megatron.seed,
    )


def reference_micro_batch_size(config: PPOConfig, dp_size: int) -> int:
    """Samples per forward pass of the reference.

    Raises:
        ConfigError: the size is not set or does not divide.
    """
    ref = config.actor_rollout_ref.ref
    return resolve_micro_batch_size(
        ref.log_prob_micro_batch_size_per_gpu,
        ref.log_prob_micro_batch_size,
        dp_size,
        key="actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    )


def reward_model_micro_batch_size(config: PPOConfig, dp_size: int) -> int:
    """Samples per forward pass of the reward model.

    Raises:
        ConfigError: the size is not set.
    """
    return resolve_micro_batch_size(
        config.reward.reward_model.micro_batch_size_per_gpu,
        None,
        dp_size,
        key="reward.reward_model.micro_batch_size_per_gpu",
    )


def updates_per_step(schedule: UpdateSchedule, samples_per_step: int) -> int:
    """Optimizer steps that a role makes in one PPO step."""
    return schedule.epochs * -(-samples_per_step // schedule.mini_batch_size)
