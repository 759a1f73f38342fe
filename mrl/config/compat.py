"""verl's older spellings: translated where their meaning is ours, explained where it is not.

Works on the list of assignments before anything is composed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrl.config.errors import ConfigError
from mrl.config.keys import suggest_keys

ROLES = {"actor_rollout_ref.actor": "actor_rollout_ref.model", "critic": "critic.model"}
"""Each trained role's section, and where its model's settings are."""

ALIASES = {
    "actor_rollout_ref.actor.fsdp_config.param_offload": "actor_rollout_ref.actor.megatron.param_offload",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "actor_rollout_ref.actor.megatron.optimizer_offload",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "actor_rollout_ref.ref.megatron.param_offload",
    "critic.model.fsdp_config.param_offload": "critic.megatron.param_offload",
    "critic.model.fsdp_config.optimizer_offload": "critic.megatron.optimizer_offload",
    "actor_rollout_ref.actor.router_replay.mode": "actor_rollout_ref.actor.megatron.router_replay.mode",
    "global_profiler.steps": "trainer.profile_steps",
    "actor_rollout_ref.actor.profiler.ranks": "trainer.profile_ranks",
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.enable": "reward.reward_model.enable",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.micro_batch_size_per_gpu": "reward.reward_model.micro_batch_size_per_gpu",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_kwargs.max_resp_len": "reward.reward_kwargs.max_resp_len",
    **{
        f"reward_model.{old}.{name}": f"reward.reward_kwargs.overlong_buffer_cfg.{name}"
        for old in ("overlong_buffer", "reward_kwargs.overlong_buffer_cfg")
        for name in ("enable", "len", "penalty_factor", "log")
    },
}
"""Accepted and mapped, with one logged line."""

_KWARGS_ALIAS = ("custom_reward_function.reward_kwargs.", "reward.custom_reward_function.reward_kwargs.")

ADVICE = {
    "actor_rollout_ref.actor.strategy": "drop it: Megatron is the only training backend",
    "critic.strategy": "drop it: Megatron is the only training backend",
    "actor_rollout_ref.ref.strategy": "drop it: Megatron is the only training backend",
    "actor_rollout_ref.actor.grad_clip": "set actor_rollout_ref.actor.optim.clip_grad",
    "critic.grad_clip": "set critic.optim.clip_grad",
    "actor_rollout_ref.actor.optim.warmup_style": "set actor_rollout_ref.actor.optim.lr_decay_style",
    "critic.optim.warmup_style": "set critic.optim.lr_decay_style",
    "actor_rollout_ref.actor.data_loader_seed": "set trainer.seed",
    "critic.enable": "drop it: a critic is built where algorithm.adv_estimator needs one, as gae does",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": (
        "set algorithm.rollout_correction.rollout_is=token and algorithm.rollout_correction.rollout_is_threshold"
    ),
    "critic.kl_ctrl.kl_coef": "set algorithm.kl_ctrl.kl_coef",
    "actor_rollout_ref.rollout.do_sample": "set actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.val_kwargs.do_sample": (
        "set actor_rollout_ref.rollout.val_kwargs.temperature (0 is greedy)"
    ),
    "actor_rollout_ref.model.enable_gradient_checkpointing": (
        "set actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity, _method and "
        "_num_layers; on the command line the key is translated to them"
    ),
    "critic.model.enable_gradient_checkpointing": (
        "set critic.megatron.override_transformer_config.recompute_granularity, _method and _num_layers; "
        "on the command line the key is translated to them"
    ),
    **{
        f"actor_rollout_ref.actor{section}.router_replay.{key}": (
            "drop it: experts go from the engines to the actor in memory, and no file is needed"
        )
        for section in ("", ".megatron")
        for key in ("record_file", "replay_file")
    },
    **{
        f"{section}.megatron.router_replay": "drop it: this role's routers choose themselves"
        for section in ("actor_rollout_ref.ref", "critic")
    },
    **{
        f"actor_rollout_ref.rollout.multi_turn.{key}": (
            "set actor_rollout_ref.rollout.multi_turn.environment.path: a function answers and calls the model's tools"
        )
        for key in (
            "tool_config_path",
            "function_tool_path",
            "interaction_config_path",
            "format",
            "max_user_turns",
            "max_parallel_calls",
            "max_tool_response_length",
            "tool_response_truncate_side",
        )
    },
    **{
        f"actor_rollout_ref.rollout.multi_turn.{key}": "drop it: the tokens of an answer are never encoded again"
        for key in ("use_inference_chat_template", "tokenization_sanity_check_mode")
    },
    "trainer.val_generations_to_log_to_wandb": "set trainer.log_val_generations",
    "trainer.remove_previous_ckpt_in_save": "set trainer.max_actor_ckpt_to_keep and trainer.max_critic_ckpt_to_keep",
    **{
        f"{role}.checkpoint.{key}": advice
        for role in ROLES
        for key, advice in {
            "strict": "drop it: exported weights are always complete, with names and shapes checked",
            "save_lora_only": "drop it: there are no LoRA adapters, all parameters are trained and saved",
            "mbridge_config": "drop it: no bridge is used, the export needs no settings",
        }.items()
    },
    "global_profiler.save_path": "drop it: traces are written to the folder profile in trainer.default_local_dir",
    "global_profiler": (
        "drop it: trainer.profile_steps alone decides, and writes torch's trace of a step and, on GPUs, of its memory"
    ),
    **{
        f"{section}.profiler": "set trainer.profile_steps and trainer.profile_ranks, which hold for all roles of a rank"
        for section in (*ROLES, "actor_rollout_ref", "actor_rollout_ref.ref", "actor_rollout_ref.rollout")
    },
    **{
        f"trainer.{key}": "drop it: start the command under nsys yourself; phases are NVTX ranges"
        for key in ("controller_nsight_options", "worker_nsight_options")
    },
    "data.tokenizer": "set actor_rollout_ref.model.tokenizer_path",
    "algorithm.filter_groups.max_inflight_gen_batches": (
        "drop it: generation batches of data.gen_batch_size prompts run one after the other"
    ),
}
"""Keys that verl has or had and that are refused, with what to do instead."""

_FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
_NO_RECOMPUTE = {"recompute_granularity": "null", "recompute_method": "null", "recompute_num_layers": "null"}


@dataclass(kw_only=True, frozen=True)
class Assignment:
    """One `key=value` of the command line; the value is still text."""

    key: str
    value: str


def translate(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """The assignments in today's spelling, and lines to log about what was mapped.

    Raises:
        ConfigError: an old and a new spelling of the same key are set to different values.
    """
    assignments, offload_notes = _translate_aliases(assignments)
    assignments, recompute_notes = _translate_recompute(assignments)
    return assignments, offload_notes + recompute_notes


def explain_unknown(key: str) -> str:
    """One line about a key that does not exist: what replaced it, or which known ones are nearest."""
    target = ALIASES.get(key)
    advice = f"set {target}" if target else _advice(key)
    if advice:
        return f"unknown key {key}: {advice}"
    nearest = suggest_keys(key)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see docs/config.md for all keys"
    return f"unknown key {key}: {hint}"


def _advice(key: str) -> str | None:
    """What is said of the key or of the nearest section around it."""
    while key:
        if key in ADVICE:
            return ADVICE[key]
        key = key.rpartition(".")[0]
    return None


def _translate_aliases(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    values = {item.key: item.value for item in assignments}
    translated: list[Assignment] = []
    mapped: list[str] = []
    for item in assignments:
        target = _alias(item.key)
        if target is None:
            translated.append(item)
            continue
        if values.get(target, item.value).lower() != item.value.lower():
            raise ConfigError(
                f"{item.key}={item.value} and {target}={values[target]} are the same setting; keep only {target}"
            )
        translated.append(Assignment(key=target, value=item.value))
        mapped.append(f"{item.key} -> {target}")
    return translated, [f"keys of other versions, mapped: {'; '.join(mapped)}"] if mapped else []


def _alias(key: str) -> str | None:
    old, new = _KWARGS_ALIAS
    return new + key.removeprefix(old) if key.startswith(old) else ALIASES.get(key)


def _translate_recompute(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """Replace `enable_gradient_checkpointing` by the recompute settings; an explicit granularity wins."""
    notes: list[str] = []
    for role, model in ROLES.items():
        old, section = f"{model}.enable_gradient_checkpointing", f"{role}.megatron.override_transformer_config"
        values = {item.key: item.value for item in assignments}
        if old not in values:
            continue
        assignments = [item for item in assignments if item.key != old]
        granularity = f"{section}.recompute_granularity"
        if granularity in values:
            notes.append(f"{old}={values[old]} is ignored: {granularity}={values[granularity]} decides")
            continue
        settings = _recompute_settings(old, values[old])
        added = [Assignment(key=f"{section}.{name}", value=value) for name, value in settings.items()]
        assignments = [*added, *assignments]
        listed = ", ".join(f"{name}={value}" for name, value in settings.items())
        notes.append(f"{old}={values[old]} -> {section}: {listed}")
    return assignments, notes


def _recompute_settings(key: str, value: str) -> dict[str, str]:
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{key} = {value} must be True or False")
    return _FULL_RECOMPUTE if value.lower() == "true" else _NO_RECOMPUTE
