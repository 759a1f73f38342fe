"""The whole configuration: `PPOConfig`, and what has to hold between its sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mrl.config.actor import ActorConfig, RefConfig
from mrl.config.algorithm import CRITIC_ESTIMATORS, GREEDY_ESTIMATORS, GROUP_ESTIMATORS, AlgorithmConfig
from mrl.config.batch import check_token_limit
from mrl.config.critic import CriticConfig
from mrl.config.data import DataConfig
from mrl.config.errors import ConfigError
from mrl.config.model import ModelConfig
from mrl.config.ray_kwargs import RayKwargsConfig
from mrl.config.reward import RewardConfig
from mrl.config.rollout import RolloutConfig
from mrl.config.section import Section
from mrl.config.trainer import TrainerConfig

NOT_WITH_REPLAY: Mapping[str, Callable[[Any], bool]] = {
    "speculative_algorithm": lambda value: value is None,
    # Its buffer has as many rows.
    "chunked_prefill_size": lambda value: value is None or value > 0,
    "pp_size": lambda value: value == 1,
    "enable_two_batch_overlap": lambda value: not value,
    "enable_dp_attention": lambda value: not value,
}
"""SGLang's arguments with which the experts it reports are none, another token's or too many for their buffer."""


@dataclass(kw_only=True, frozen=True)
class ActorRolloutRefConfig(Section):
    """The policy in its three places: trained, generating, frozen as reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The actor's initial weights, which are also the reference's."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    """The policy's updates."""
    ref: RefConfig = field(default_factory=RefConfig)
    """The frozen reference policy."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout engines."""


@dataclass(kw_only=True, frozen=True)
class PPOConfig(Section):
    """Root of the configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    """The policy."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value function."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Scoring."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Advantages and the in-reward KL penalty."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, place and outputs of the run."""
    ray_kwargs: RayKwargsConfig = field(default_factory=RayKwargsConfig)
    """How the job joins a Ray cluster."""

    @property
    def needs_reference(self) -> bool:
        """Whether any KL term is active; without one no reference model is built."""
        return self.algorithm.use_kl_in_reward or self.actor_rollout_ref.actor.use_kl_loss

    @property
    def needs_critic(self) -> bool:
        """Whether advantages are made from values; without a critic none is built."""
        return self.algorithm.adv_estimator in CRITIC_ESTIMATORS

    @property
    def replays_routers(self) -> bool:
        """Whether the actor sends tokens to the experts that the engines chose."""
        return self.actor_rollout_ref.actor.megatron.router_replay.mode == "R3"

    @property
    def turn_length(self) -> int:
        """Most tokens of one answer of the model."""
        settings, longest = self.actor_rollout_ref.rollout.multi_turn, self.data.max_response_length
        if not settings.enable:
            return longest
        return settings.max_turn_length or max(1, longest // (settings.max_assistant_turns or 1))

    @property
    def gen_batch_size(self) -> int:
        """Prompts drawn and generated at a time."""
        filtered = self.algorithm.filter_groups.enable
        return (filtered and self.data.gen_batch_size) or self.data.train_batch_size

    def check(self) -> None:
        self._check_batch("actor_rollout_ref.actor", self.actor_rollout_ref.actor)
        if self.needs_critic:
            self._check_batch("critic", self.critic)
        self._check_estimator()
        self._check_filter_groups()
        self._check_overlong()
        self._check_correction()
        self._check_reward_model()
        self._check_lengths()
        self._check_token_limits()
        self._check_engines()
        self._check_context()
        self._check_dtypes()
        self._check_router_replay()
        self._check_turns()
        if self.trainer.validates and not self.data.val_files:
            raise ConfigError(
                "data.val_files is empty, but the run validates; name a file, or set trainer.val_before_train=False "
                "and trainer.test_freq=-1"
            )

    def _check_batch(self, path: str, role: ActorConfig | CriticConfig) -> None:
        prompts, mini_batch, n = self.data.train_batch_size, role.ppo_mini_batch_size, self.actor_rollout_ref.rollout.n
        if mini_batch > prompts:
            raise ConfigError(
                f"{path}.ppo_mini_batch_size = {mini_batch} is larger than data.train_batch_size = {prompts}; "
                "lower it (both count prompts)"
            )
        if prompts % mini_batch:
            raise ConfigError(
                f"{path}.ppo_mini_batch_size = {mini_batch} does not divide data.train_batch_size = {prompts}; "
                "every optimizer step takes the same number of prompts"
            )
        for key in () if role.use_dynamic_bsz else ("ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size"):
            micro_batch = getattr(role, key)
            if micro_batch is not None and (mini_batch * n) % micro_batch:
                raise ConfigError(
                    f"{path}.{key} = {micro_batch} does not divide a mini-batch of {mini_batch * n} samples "
                    f"(ppo_mini_batch_size {mini_batch} x rollout.n {n})"
                )

    def _check_estimator(self) -> None:
        estimator, n = self.algorithm.adv_estimator, self.actor_rollout_ref.rollout.n
        if estimator in GROUP_ESTIMATORS and n < 2:
            raise ConfigError(
                f"algorithm.adv_estimator = {estimator} compares the responses to a prompt with each other, but "
                f"actor_rollout_ref.rollout.n = {n}; set it to at least 2, or take reinforce_plus_plus, remax or gae"
            )
        warmup = self.trainer.critic_warmup
        if warmup and not self.needs_critic:
            raise ConfigError(
                f"trainer.critic_warmup = {warmup}, but algorithm.adv_estimator = {estimator} has no critic: those "
                "steps would train nothing; set it to 0"
            )

    def _check_router_replay(self) -> None:
        engine_args = self.actor_rollout_ref.rollout.engine_kwargs.sglang
        for name, is_allowed in NOT_WITH_REPLAY.items():
            if self.replays_routers and name in engine_args and not is_allowed(engine_args[name]):
                raise ConfigError(
                    "actor_rollout_ref.actor.megatron.router_replay.mode = R3 needs every token's experts, and SGLang "
                    f"does not report all of them with engine_kwargs.sglang.{name} = {engine_args[name]!r}; drop one"
                )

    def _check_turns(self) -> None:
        rollout = self.actor_rollout_ref.rollout
        if rollout.multi_turn.enable and rollout.ignore_eos:
            raise ConfigError(
                "actor_rollout_ref.rollout.multi_turn.enable needs answers that end, and rollout.ignore_eos = True "
                "cuts all of them at their full length; set one to False"
            )
        if self.turn_length > self.data.max_response_length:
            raise ConfigError(
                f"actor_rollout_ref.rollout.multi_turn.max_turn_length = {self.turn_length} is more than a whole "
                f"conversation may have: data.max_response_length = {self.data.max_response_length}; raise that"
            )

    def _check_filter_groups(self) -> None:
        settings, n = self.algorithm.filter_groups, self.actor_rollout_ref.rollout.n
        if not settings.enable:
            return
        if n < 2:
            raise ConfigError(
                f"algorithm.filter_groups.enable needs responses to compare, but actor_rollout_ref.rollout.n = {n}; "
                "set it to at least 2"
            )
        if settings.metric == "seq_final_reward" and self.algorithm.use_kl_in_reward:
            raise ConfigError(
                "algorithm.filter_groups.metric = seq_final_reward is known only after the KL penalty, too late to "
                "replace a prompt; set it to reward, or algorithm.use_kl_in_reward=False"
            )
        most, needed = settings.max_num_gen_batches * self.gen_batch_size, self.data.train_batch_size
        if 0 < most < needed:
            raise ConfigError(
                f"algorithm.filter_groups.max_num_gen_batches = {settings.max_num_gen_batches} batches of "
                f"{self.gen_batch_size} prompts can never fill data.train_batch_size = {needed}; raise it or "
                "data.gen_batch_size"
            )

    def _check_reward_model(self) -> None:
        """Its scores come when the engines have given the devices back."""
        if not self.reward.reward_model.enable:
            return
        for key, active, why in (
            ("filter_groups.enable", self.algorithm.filter_groups.enable, "prompts are replaced by their rewards"),
            ("adv_estimator", self.algorithm.adv_estimator in GREEDY_ESTIMATORS, "greedy responses are scored"),
        ):
            if active:
                raise ConfigError(
                    f"reward.reward_model.enable = True scores samples after the rollout, but algorithm.{key} needs "
                    f"them during it ({why}); use reward.judge or reward.functions, or another setting"
                )

    def _check_overlong(self) -> None:
        settings, limit = self.reward.reward_kwargs, self.data.max_response_length
        if not settings.overlong_buffer_cfg.enable:
            return
        max_resp_len, buffer_len = settings.max_resp_len or limit, settings.overlong_buffer_cfg.len
        if not buffer_len <= max_resp_len <= limit:
            raise ConfigError(
                f"reward.reward_kwargs: overlong_buffer_cfg.len = {buffer_len}, max_resp_len = {max_resp_len} and "
                f"data.max_response_length = {limit} must not decrease in this order"
            )

    def _check_correction(self) -> None:
        correction, loss_mode = self.algorithm.rollout_correction, self.actor_rollout_ref.actor.policy_loss.loss_mode
        if correction.bypass_mode and loss_mode != "vanilla":
            raise ConfigError(
                "algorithm.rollout_correction.bypass_mode = True chooses the loss by loss_type = "
                f"{correction.loss_type}, but actor_rollout_ref.actor.policy_loss.loss_mode = {loss_mode}; set "
                "bypass_mode=False or leave loss_mode at vanilla"
            )
        if loss_mode == "geo_mean" and correction.rollout_is == "token" and correction.weight_bounds.lower is not None:
            raise ConfigError(
                f"algorithm.rollout_correction.rollout_is_threshold = {correction.rollout_is_threshold} sets weights "
                "of tokens to 0, and policy_loss.loss_mode = geo_mean multiplies a sequence's weights: one token would "
                "silence it; give an upper bound only, or set rollout_is=sequence"
            )

    def _check_lengths(self) -> None:
        rollout = self.actor_rollout_ref.rollout
        for key, here, there in (
            ("prompt_length", rollout.prompt_length, self.data.max_prompt_length),
            ("response_length", rollout.response_length, self.data.max_response_length),
        ):
            if here != there:
                raise ConfigError(
                    f"actor_rollout_ref.rollout.{key} = {here} and data.max_{key} = {there} mean the same number; "
                    f"set only data.max_{key}"
                )

    def _check_token_limits(self) -> None:
        shared, critic = self.actor_rollout_ref, self.critic
        longest = self.data.max_length

        def check(path: str, section: Section, key: str, cp: int) -> None:
            check_token_limit(f"{path}.{key}", getattr(section, key), longest=longest, cp=cp)

        cp = shared.actor.megatron.context_parallel_size
        if shared.actor.use_dynamic_bsz:
            check("actor_rollout_ref.actor", shared.actor, "ppo_max_token_len_per_gpu", cp)
        if shared.rollout.log_prob_use_dynamic_bsz:
            check("actor_rollout_ref.rollout", shared.rollout, "log_prob_max_token_len_per_gpu", cp)
        if self.needs_reference and shared.ref.log_prob_use_dynamic_bsz:
            ref_cp = shared.ref.megatron.context_parallel_size
            check("actor_rollout_ref.ref", shared.ref, "log_prob_max_token_len_per_gpu", ref_cp)
        if self.needs_critic and critic.use_dynamic_bsz:
            for key in ("ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu"):
                check("critic", critic, key, critic.megatron.context_parallel_size)

    def _check_context(self) -> None:
        context, needed = self.actor_rollout_ref.rollout.max_model_len, self.data.max_length
        if context is not None and context < needed:
            raise ConfigError(
                f"actor_rollout_ref.rollout.max_model_len = {context} is less than data.max_prompt_length + "
                f"data.max_response_length = {needed}: responses would be cut short; raise it, or leave it null"
            )

    def _check_dtypes(self) -> None:
        actor, rollout = self.actor_rollout_ref.actor.megatron.dtype, self.actor_rollout_ref.rollout.dtype
        if actor != rollout:
            raise ConfigError(
                f"actor_rollout_ref.actor.megatron.dtype = {actor}, but actor_rollout_ref.rollout.dtype = {rollout}: "
                "engines take the actor's bytes as they are; set both to the same"
            )

    def _check_engines(self) -> None:
        rollout, world_size = self.actor_rollout_ref.rollout, self.trainer.world_size
        num_engines, size = rollout.num_engines or 1, rollout.tensor_model_parallel_size
        if num_engines * size > world_size:
            raise ConfigError(
                f"actor_rollout_ref.rollout: {num_engines} engine(s) of tensor_model_parallel_size = {size} need "
                f"{num_engines * size} ranks, but trainer.nnodes x trainer.n_gpus_per_node = {world_size}"
            )
