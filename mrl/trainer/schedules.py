"""How much each role takes at a time, from the configuration and the role's layout."""

from __future__ import annotations

from mrl.config.actor import ActorConfig, RefConfig
from mrl.config.batch import check_mini_batch, resolve_micro_batch_size
from mrl.config.critic import CriticConfig
from mrl.config.rollout import RolloutConfig
from mrl.config.schema import PPOConfig
from mrl.config.section import Section
from mrl.parallel.layout import ParallelLayout
from mrl.trainer.updates import UpdateSchedule
from mrl.types import MicroBatchLimit


def actor_schedule(config: PPOConfig, layout: ParallelLayout) -> UpdateSchedule:
    """The actor's mini-batches and micro-batches.

    Raises:
        ConfigError: a size is not set or does not divide.
    """
    shared = config.actor_rollout_ref
    forward = _log_prob_limit("actor_rollout_ref.rollout", shared.rollout, layout)
    return _schedule("actor_rollout_ref.actor", shared.actor, shared.rollout.n, layout, forward)


def critic_schedule(config: PPOConfig, layout: ParallelLayout) -> UpdateSchedule:
    """The critic's mini-batches and micro-batches.

    Raises:
        ConfigError: a size is not set or does not divide.
    """
    critic = config.critic
    if critic.use_dynamic_bsz:
        forward = _token_limit(critic.forward_max_token_len_per_gpu, layout)
    else:
        forward = _sample_limit("critic", critic, "forward_micro_batch_size", layout)
    return _schedule("critic", critic, config.actor_rollout_ref.rollout.n, layout, forward)


def reference_limit(config: PPOConfig, layout: ParallelLayout) -> MicroBatchLimit:
    """Of the reference's forward passes.

    Raises:
        ConfigError: the size is not set or does not divide.
    """
    return _log_prob_limit("actor_rollout_ref.ref", config.actor_rollout_ref.ref, layout)


def reward_model_limit(config: PPOConfig, layout: ParallelLayout) -> MicroBatchLimit:
    """Of the reward model's forward passes.

    Raises:
        ConfigError: the size is not set.
    """
    samples = resolve_micro_batch_size(
        config.reward.reward_model.micro_batch_size_per_gpu,
        None,
        layout.dp,
        key="reward.reward_model.micro_batch_size_per_gpu",
    )
    return MicroBatchLimit(samples=samples)


def updates_per_step(schedule: UpdateSchedule, samples_per_step: int) -> int:
    """Optimizer steps that a role makes in one PPO step."""
    return schedule.epochs * -(-samples_per_step // schedule.mini_batch_size)


def _schedule(
    path: str, role: ActorConfig | CriticConfig, n: int, layout: ParallelLayout, forward: MicroBatchLimit
) -> UpdateSchedule:
    mini_batch_size = role.ppo_mini_batch_size * n
    if role.use_dynamic_bsz:
        update = _token_limit(role.ppo_max_token_len_per_gpu, layout)
    else:
        update = _sample_limit(path, role, "ppo_micro_batch_size", layout)
    if update.samples is not None:
        check_mini_batch(
            path=path, mini_batch_samples=mini_batch_size, micro_batch_size=update.samples, dp_size=layout.dp
        )
    return UpdateSchedule(
        mini_batch_size=mini_batch_size,
        update_limit=update,
        forward_limit=forward,
        epochs=role.ppo_epochs,
        shuffle=role.shuffle,
        seed=role.megatron.seed,
    )


def _log_prob_limit(path: str, section: RolloutConfig | RefConfig, layout: ParallelLayout) -> MicroBatchLimit:
    if section.log_prob_use_dynamic_bsz:
        return _token_limit(section.log_prob_max_token_len_per_gpu, layout)
    return _sample_limit(path, section, "log_prob_micro_batch_size", layout)


def _token_limit(tokens_per_gpu: int, layout: ParallelLayout) -> MicroBatchLimit:
    """Context-parallel ranks share a micro-batch's tokens."""
    return MicroBatchLimit(tokens=tokens_per_gpu * layout.cp)


def _sample_limit(path: str, section: Section, key: str, layout: ParallelLayout) -> MicroBatchLimit:
    samples = resolve_micro_batch_size(
        getattr(section, f"{key}_per_gpu"), getattr(section, key), layout.dp, key=f"{path}.{key}_per_gpu"
    )
    return MicroBatchLimit(samples=samples)
