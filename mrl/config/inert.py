"""Settings that would do nothing in the chosen configuration, so that none is ignored in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mrl.config.actor import SEQUENCE_MEAN_LOSSES, ActorConfig
from mrl.config.algorithm import DISCOUNTING_ESTIMATORS, SCALING_ESTIMATORS
from mrl.config.critic import CriticConfig
from mrl.config.keys import default_values, flatten
from mrl.config.optim import OptimConfig
from mrl.config.rollout_correction import RolloutCorrectionConfig
from mrl.config.schema import PPOConfig


@dataclass(kw_only=True, frozen=True)
class _Rule:
    """Keys that are inert when `when` holds. They count as set when named in overrides or unlike their default."""

    keys: tuple[str, ...]
    """Key paths; one that ends in a dot is all keys below it."""
    when: Callable[[PPOConfig], bool]
    reason: str
    overrides_only: bool = False
    """Another key's value is their default, so being unlike the schema's default says nothing."""


def find_inert_settings(config: PPOConfig, *, set_keys: Collection[str] = ()) -> list[str]:
    """One line for each group of settings that has no effect, saying why and what to set instead.

    Settings that only a CPU ignores are included if `trainer.device` is cpu.

    Args:
        set_keys: leaf keys named in overrides, reported even if they repeat the default.
    """
    lines = _apply(_RULES, config, set_keys)
    return lines + find_inert_on_cpu(config, set_keys=set_keys) if config.trainer.device == "cpu" else lines


def find_inert_on_cpu(config: PPOConfig, *, set_keys: Collection[str] = ()) -> list[str]:
    """The lines about settings that act on GPUs only, for whoever finds that `trainer.device=auto` means a CPU."""
    return _apply(_CPU_RULES, config, set_keys)


def _apply(rules: Iterable[_Rule], config: PPOConfig, set_keys: Collection[str]) -> list[str]:
    values, defaults = flatten(config), default_values()
    changed = {key for key, value in values.items() if value != defaults[key]}
    lines = []
    for rule in rules:
        if not rule.when(config):
            continue
        candidates = set(set_keys) if rule.overrides_only else changed | set(set_keys)
        found = [key for key in values if _matches(rule, key) and key in candidates]
        if found:
            listed = ", ".join(f"{key}={values[key]}" for key in found)
            lines.append(f"{listed} does not act: {rule.reason}")
    return lines


def _matches(rule: _Rule, key: str) -> bool:
    return any(key.startswith(pattern) if pattern.endswith(".") else key == pattern for pattern in rule.keys)


_ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
_RoleOf = Callable[[PPOConfig], ActorConfig | CriticConfig]


def _actor(config: PPOConfig) -> ActorConfig:
    return config.actor_rollout_ref.actor


def _critic(config: PPOConfig) -> CriticConfig:
    return config.critic


def _clip_ratio_unused(config: PPOConfig) -> bool:
    actor = config.actor_rollout_ref.actor
    return actor.clip_ratio not in (actor.clip_ratio_low, actor.clip_ratio_high)


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


def _loss_rule(losses: frozenset[str]) -> _Rule:
    return _Rule(
        keys=tuple(f"{_ACTOR}.{key}" for key, takers in LOSS_SETTINGS.items() if takers == losses),
        when=lambda config: _loss_in_use(config) not in losses,
        reason=f"only {_ACTOR}.policy_loss.loss_mode={', '.join(sorted(losses))} takes it",
    )


def _aggregates_nothing(config: PPOConfig) -> bool:
    """The actor's aggregation acts on neither a loss term nor the critic, which follows it unless set."""
    actor = config.actor_rollout_ref.actor
    followed = config.needs_critic and config.critic.loss_agg_mode == actor.loss_agg_mode
    has_own = actor.policy_loss.loss_mode in SEQUENCE_MEAN_LOSSES
    return has_own and not (followed or actor.use_kl_loss or actor.entropy_coeff != 0)


_CORRECTION = "algorithm.rollout_correction"
_CORRECTION_RULES = (
    _Rule(
        keys=(f"{_CORRECTION}.loss_type",),
        when=lambda config: not config.algorithm.rollout_correction.bypass_mode,
        reason=f"{_CORRECTION}.bypass_mode is False, so {_ACTOR}.policy_loss.loss_mode is the loss",
    ),
    _Rule(
        keys=(f"{_CORRECTION}.rollout_is",),
        when=lambda config: _weighs_nothing(config.algorithm.rollout_correction),
        reason="in bypass_mode the ratio of PPO's clipped loss is that of trainer to engine already; set "
        f"{_CORRECTION}.loss_type=reinforce",
    ),
    _Rule(
        keys=(f"{_CORRECTION}.rollout_is_batch_normalize",),
        when=lambda config: config.algorithm.rollout_correction.rollout_is is None,
        reason=f"{_CORRECTION}.rollout_is is null, so there are no weights",
    ),
    _Rule(
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


_LOSS_RULES = (
    *(_loss_rule(losses) for losses in dict.fromkeys(LOSS_SETTINGS.values())),
    _Rule(
        keys=(f"{_ACTOR}.loss_agg_mode",),
        when=_aggregates_nothing,
        reason=f"{_ACTOR}.policy_loss.loss_mode={', '.join(sorted(SEQUENCE_MEAN_LOSSES))} always take "
        "seq-mean-token-mean, and the loss has no other term",
    ),
)


def _needs_no_step_count(optim: OptimConfig) -> bool:
    warms_up_by_ratio = optim.lr_warmup_steps_ratio > 0 and optim.lr_warmup_steps < 0
    return optim.lr_decay_style == "constant" and not warms_up_by_ratio


def _role_rules(path: str, role: _RoleOf, *, loss_scale_inherited: bool) -> tuple[_Rule, ...]:
    return (
        _Rule(
            keys=(f"{path}.loss_scale_factor",),
            when=lambda config: role(config).loss_agg_mode != "seq-mean-token-sum-norm",
            reason=f"it is the divisor of {path}.loss_agg_mode=seq-mean-token-sum-norm only",
            overrides_only=loss_scale_inherited,
        ),
        _Rule(
            keys=(f"{path}.optim.min_lr",),
            when=lambda config: role(config).optim.lr_decay_style == "constant",
            reason=f"the learning rate is constant; set {path}.optim.lr_decay_style=linear or cosine",
        ),
        _Rule(
            keys=(f"{path}.optim.lr_warmup_steps_ratio",),
            when=lambda config: role(config).optim.lr_warmup_steps >= 0,
            reason=f"{path}.optim.lr_warmup_steps is set and takes precedence",
        ),
        _Rule(
            keys=(f"{path}.optim.total_training_steps",),
            when=lambda config: _needs_no_step_count(role(config).optim),
            reason="the learning rate is constant and no warm-up is given as a ratio",
        ),
        _Rule(
            keys=(f"{path}.megatron.dist_checkpointing_path",),
            when=lambda config: not role(config).megatron.use_dist_checkpointing,
            reason=f"{path}.megatron.use_dist_checkpointing is False, so the weights are those of the model's folder",
        ),
    )


_KL_RULES = (
    _Rule(
        keys=("algorithm.kl_ctrl.", "algorithm.kl_penalty"),
        when=lambda config: not config.algorithm.use_kl_in_reward,
        reason="algorithm.use_kl_in_reward is False, so no KL penalty is subtracted from the rewards (early verl "
        "versions did so unless actor.use_kl_loss was set); set algorithm.use_kl_in_reward=True to have it act",
    ),
    _Rule(
        keys=("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
        when=lambda config: config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.type == "fixed",
        reason="the coefficient is fixed; set algorithm.kl_ctrl.type=adaptive",
    ),
    _Rule(
        keys=(f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"),
        when=lambda config: not config.actor_rollout_ref.actor.use_kl_loss,
        reason=f"{_ACTOR}.use_kl_loss is False, so the loss has no KL term; set it to True",
    ),
    _Rule(
        keys=(f"{_REF}.",),
        when=lambda config: not config.needs_reference,
        reason="no KL term is active, so no reference model is built; set algorithm.use_kl_in_reward=True or "
        f"{_ACTOR}.use_kl_loss=True",
        overrides_only=True,
    ),
)
_ESTIMATOR_RULES = (
    _Rule(
        keys=("critic.", "trainer.max_critic_ckpt_to_keep"),
        when=lambda config: not config.needs_critic,
        reason="advantages are made without values, so no critic is built; set algorithm.adv_estimator=gae",
        overrides_only=True,
    ),
    _Rule(
        keys=("algorithm.gamma",),
        when=lambda config: config.algorithm.adv_estimator not in DISCOUNTING_ESTIMATORS,
        reason="algorithm.adv_estimator does not discount; gae and reinforce_plus_plus do",
    ),
    _Rule(
        keys=("algorithm.lam",),
        when=lambda config: config.algorithm.adv_estimator != "gae",
        reason="it is a setting of algorithm.adv_estimator=gae",
    ),
    _Rule(
        keys=("algorithm.norm_adv_by_std_in_grpo",),
        when=lambda config: config.algorithm.adv_estimator not in SCALING_ESTIMATORS,
        reason="it is a setting of algorithm.adv_estimator=grpo and grpo_passk",
    ),
    _Rule(
        keys=("algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches", "data.gen_batch_size"),
        when=lambda config: not config.algorithm.filter_groups.enable,
        reason="every prompt is kept, so a step generates data.train_batch_size prompts at once; set "
        "algorithm.filter_groups.enable=True",
    ),
    _Rule(
        keys=("reward.reward_kwargs.",),
        when=lambda config: not config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        reason="long responses are not penalised; set reward.reward_kwargs.overlong_buffer_cfg.enable=True",
    ),
    _Rule(
        keys=("reward.reward_manager.name",),
        when=lambda config: True,
        reason="there is one way of calling reward functions; reward.reward_kwargs.overlong_buffer_cfg.enable alone "
        "turns DAPO's penalty on",
    ),
)
_ROLLOUT_RULES = (
    _Rule(
        keys=(f"{_ROLLOUT}.calculate_log_probs",),
        when=lambda config: not config.actor_rollout_ref.rollout.calculate_log_probs,
        reason="engines always return log-probs, and every step compares them with the trainer's",
    ),
    _Rule(
        keys=(f"{_ROLLOUT}.mode",),
        when=lambda config: True,
        reason="engines run in-process and are fed from one queue, whatever the mode",
    ),
    _Rule(
        keys=(f"{_ROLLOUT}.load_format",),
        when=lambda config: config.actor_rollout_ref.rollout.load_format != "dummy",
        reason="the actor's weights replace whatever the engine loaded before the first rollout; leave it at dummy",
    ),
)
_RUN_RULES = (
    _Rule(
        keys=("trainer.balance_batch",),
        when=lambda config: not config.trainer.balance_batch,
        reason="samples are always dealt out to data-parallel ranks by token count",
    ),
    _Rule(
        keys=(
            f"{_ROLLOUT}.val_kwargs.",
            "data.val_batch_size",
            "data.val_max_samples",
            "trainer.log_val_generations",
            "trainer.validation_data_dir",
        ),
        when=lambda config: not config.trainer.validates,
        reason="the run does not validate; set trainer.val_before_train=True or trainer.test_freq",
    ),
    _Rule(
        keys=("data.seed",),
        when=lambda config: not config.data.shuffle,
        reason="data.shuffle is False",
    ),
    _Rule(
        keys=("data.truncation",),
        when=lambda config: config.data.filter_overlong_prompts,
        reason="data.filter_overlong_prompts is True, so no over-long prompt is left to truncate",
    ),
    _Rule(
        keys=("data.return_raw_chat",),
        when=lambda config: not config.data.return_raw_chat,
        reason="the chat messages are kept with every prompt",
    ),
    _Rule(
        keys=("reward.custom_reward_function.name", "reward.custom_reward_function.reward_kwargs"),
        when=lambda config: config.reward.custom_reward_function.path is None,
        reason="reward.custom_reward_function.path is null, so it names no function",
    ),
    _Rule(
        keys=("reward.reward_model.",),
        when=lambda config: not config.reward.reward_model.enable,
        reason="reward.reward_model.enable is False, so no reward model is built",
    ),
    _Rule(
        keys=("reward.judge.",),
        when=lambda config: config.reward.judge.url is None,
        reason="reward.judge.url is null, so no judge is asked",
    ),
    _Rule(
        keys=("reward.verifiers",),
        when=lambda config: all(part.path or part.verifier for part in config.reward.parts.values()),
        reason="no reward is left to the verifier of each sample's data source",
    ),
    _Rule(
        keys=("trainer.default_hdfs_dir",),
        when=lambda config: config.trainer.default_hdfs_dir is not None,
        reason="nothing is copied to HDFS; outputs are in trainer.default_local_dir",
    ),
    _Rule(
        keys=(
            *(f"{role}.checkpoint.{key}" for role in (_ACTOR, "critic") for key in ("save_contents", "async_save")),
            "trainer.max_actor_ckpt_to_keep",
            "trainer.max_critic_ckpt_to_keep",
        ),
        when=lambda config: config.trainer.save_freq <= 0 or config.trainer.val_only,
        reason="the run saves no checkpoint; set trainer.save_freq (above the number of steps it saves the last only)",
    ),
    _Rule(
        keys=(f"{_ACTOR}.checkpoint.load_contents", "critic.checkpoint.load_contents"),
        when=lambda config: config.trainer.resume_mode == "disable",
        reason="trainer.resume_mode is disable, so no checkpoint is loaded",
    ),
    _Rule(
        keys=("trainer.resume_from_path",),
        when=lambda config: config.trainer.resume_mode != "resume_path",
        reason="trainer.resume_mode is not resume_path",
    ),
    _Rule(
        keys=("trainer.ray_wait_register_center_timeout",),
        when=lambda config: config.trainer.launcher != "ray",
        reason="trainer.launcher is not ray",
    ),
    _Rule(
        keys=(f"{_ACTOR}.clip_ratio",),
        when=_clip_ratio_unused,
        reason=f"{_ACTOR}.clip_ratio_low and clip_ratio_high are both set and take precedence",
    ),
)


def _batch_rules(path: str, switch: str, is_dynamic: Callable[[PPOConfig], bool], kinds: dict[str, str]) -> list[_Rule]:
    """Of a section's passes, by the prefix of each's micro-batch keys and the name of its token limit."""
    rules = []
    for prefix, tokens in kinds.items():
        sizes = tuple(f"{path}.{prefix}micro_batch_size{end}" for end in ("_per_gpu", ""))
        rules += [
            _Rule(
                keys=sizes,
                when=is_dynamic,
                reason=f"{path}.{switch} is True, so {path}.{tokens} limits micro-batches",
                overrides_only=True,
            ),
            _Rule(
                keys=(f"{path}.{tokens}",),
                when=lambda config: not is_dynamic(config),
                reason=f"{path}.{switch} is False, so {sizes[0]} limits micro-batches; set {path}.{switch}=True",
                overrides_only=True,
            ),
        ]
    return rules


_LOG_PROB_KEYS = {"log_prob_": "log_prob_max_token_len_per_gpu"}
_BATCH_RULES = (
    *_batch_rules(
        _ACTOR,
        "use_dynamic_bsz",
        lambda config: config.actor_rollout_ref.actor.use_dynamic_bsz,
        {"ppo_": "ppo_max_token_len_per_gpu"},
    ),
    *_batch_rules(
        _ROLLOUT,
        "log_prob_use_dynamic_bsz",
        lambda config: config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz,
        _LOG_PROB_KEYS,
    ),
    *_batch_rules(
        _REF,
        "log_prob_use_dynamic_bsz",
        lambda config: config.actor_rollout_ref.ref.log_prob_use_dynamic_bsz,
        _LOG_PROB_KEYS,
    ),
    *_batch_rules(
        "critic",
        "use_dynamic_bsz",
        lambda config: config.critic.use_dynamic_bsz,
        {"ppo_": "ppo_max_token_len_per_gpu", "forward_": "forward_max_token_len_per_gpu"},
    ),
)


def _actors_padding_is_its_own(config: PPOConfig) -> bool:
    shared = config.actor_rollout_ref
    return shared.model.use_remove_padding != shared.actor.megatron.use_remove_padding


def _critics_padding_is_its_own(config: PPOConfig) -> bool:
    return config.critic.model.use_remove_padding != config.critic.megatron.use_remove_padding


_PADDING_RULES = (
    _Rule(
        keys=("actor_rollout_ref.model.use_remove_padding",),
        when=_actors_padding_is_its_own,
        reason=f"{_ACTOR}.megatron.use_remove_padding is set and takes precedence",
        overrides_only=True,
    ),
    _Rule(
        keys=("critic.model.use_remove_padding",),
        when=_critics_padding_is_its_own,
        reason="critic.megatron.use_remove_padding is set and takes precedence",
        overrides_only=True,
    ),
)
_RULES = (
    *_KL_RULES,
    *_ESTIMATOR_RULES,
    *_LOSS_RULES,
    *_CORRECTION_RULES,
    *_BATCH_RULES,
    *_PADDING_RULES,
    *_role_rules(_ACTOR, _actor, loss_scale_inherited=False),
    *_role_rules("critic", _critic, loss_scale_inherited=True),
    *_ROLLOUT_RULES,
    *_RUN_RULES,
)
_CPU_RULES = (
    *(
        _Rule(
            keys=tuple(f"{path}.megatron.{kind}_offload" for kind in ("param", "grad", "optimizer")),
            when=lambda config: True,
            reason="on CPU there is no device memory to offload from",
        )
        for path in (_ACTOR, _REF, "critic", "reward.reward_model")
    ),
    _Rule(
        keys=(f"{_ROLLOUT}.enforce_eager", f"{_ROLLOUT}.free_cache_engine"),
        when=lambda config: True,
        reason="on CPU there are no CUDA graphs and no device memory to release",
    ),
)
