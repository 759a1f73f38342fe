"""Settings of one role, its batches and its memory that another choice leaves without effect."""

from __future__ import annotations

from collections.abc import Callable

from mrl.config.actor import ActorConfig
from mrl.config.critic import CriticConfig
from mrl.config.inert_rules.rule import ACTOR, REF, ROLLOUT, Rule
from mrl.config.optim import OptimConfig
from mrl.config.schema import PPOConfig

_RoleOf = Callable[[PPOConfig], ActorConfig | CriticConfig]


def _actor(config: PPOConfig) -> ActorConfig:
    return config.actor_rollout_ref.actor


def _critic(config: PPOConfig) -> CriticConfig:
    return config.critic


def _needs_no_step_count(optim: OptimConfig) -> bool:
    warms_up_by_ratio = optim.lr_warmup_steps_ratio > 0 and optim.lr_warmup_steps < 0
    return optim.lr_decay_style == "constant" and not warms_up_by_ratio


def _role_rules(path: str, role: _RoleOf, *, loss_scale_inherited: bool) -> tuple[Rule, ...]:
    return (
        Rule(
            keys=(f"{path}.loss_scale_factor",),
            when=lambda config: role(config).loss_agg_mode != "seq-mean-token-sum-norm",
            reason=f"it is the divisor of {path}.loss_agg_mode=seq-mean-token-sum-norm only",
            overrides_only=loss_scale_inherited,
        ),
        Rule(
            keys=(f"{path}.optim.min_lr",),
            when=lambda config: role(config).optim.lr_decay_style == "constant",
            reason=f"the learning rate is constant; set {path}.optim.lr_decay_style=linear or cosine",
        ),
        Rule(
            keys=(f"{path}.optim.lr_warmup_steps_ratio",),
            when=lambda config: role(config).optim.lr_warmup_steps >= 0,
            reason=f"{path}.optim.lr_warmup_steps is set and takes precedence",
        ),
        Rule(
            keys=(f"{path}.optim.total_training_steps",),
            when=lambda config: _needs_no_step_count(role(config).optim),
            reason="the learning rate is constant and no warm-up is given as a ratio",
        ),
        Rule(
            keys=(f"{path}.megatron.dist_checkpointing_path",),
            when=lambda config: not role(config).megatron.use_dist_checkpointing,
            reason=f"{path}.megatron.use_dist_checkpointing is False, so the weights are those of the model's folder",
        ),
    )


def _batch_rules(path: str, switch: str, is_dynamic: Callable[[PPOConfig], bool], kinds: dict[str, str]) -> list[Rule]:
    """Of a section's passes, by the prefix of each's micro-batch keys and the name of its token limit."""
    rules = []
    for prefix, tokens in kinds.items():
        sizes = tuple(f"{path}.{prefix}micro_batch_size{end}" for end in ("_per_gpu", ""))
        rules += [
            Rule(
                keys=sizes,
                when=is_dynamic,
                reason=f"{path}.{switch} is True, so {path}.{tokens} limits micro-batches",
                overrides_only=True,
            ),
            Rule(
                keys=(f"{path}.{tokens}",),
                when=lambda config: not is_dynamic(config),
                reason=f"{path}.{switch} is False, so {sizes[0]} limits micro-batches; set {path}.{switch}=True",
                overrides_only=True,
            ),
        ]
    return rules


_LOG_PROB_KEYS = {"log_prob_": "log_prob_max_token_len_per_gpu"}
BATCH_RULES = (
    *_batch_rules(
        ACTOR,
        "use_dynamic_bsz",
        lambda config: config.actor_rollout_ref.actor.use_dynamic_bsz,
        {"ppo_": "ppo_max_token_len_per_gpu"},
    ),
    *_batch_rules(
        ROLLOUT,
        "log_prob_use_dynamic_bsz",
        lambda config: config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz,
        _LOG_PROB_KEYS,
    ),
    *_batch_rules(
        REF,
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


PADDING_RULES = (
    Rule(
        keys=("actor_rollout_ref.model.use_remove_padding",),
        when=_actors_padding_is_its_own,
        reason=f"{ACTOR}.megatron.use_remove_padding is set and takes precedence",
        overrides_only=True,
    ),
    Rule(
        keys=("critic.model.use_remove_padding",),
        when=_critics_padding_is_its_own,
        reason="critic.megatron.use_remove_padding is set and takes precedence",
        overrides_only=True,
    ),
)
ROLE_RULES = (
    *_role_rules(ACTOR, _actor, loss_scale_inherited=False),
    *_role_rules("critic", _critic, loss_scale_inherited=True),
)
CPU_RULES = (
    *(
        Rule(
            keys=tuple(f"{path}.megatron.{kind}_offload" for kind in ("param", "grad", "optimizer")),
            when=lambda config: True,
            reason="on CPU there is no device memory to offload from",
        )
        for path in (ACTOR, REF, "critic", "reward.reward_model")
    ),
    Rule(
        keys=(f"{ROLLOUT}.enforce_eager", f"{ROLLOUT}.free_cache_engine"),
        when=lambda config: True,
        reason="on CPU there are no CUDA graphs and no device memory to release",
    ),
)
