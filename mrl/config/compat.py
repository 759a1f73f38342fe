"""verl's older spellings: translated where their meaning is ours, explained where it is not.

Works on the list of assignments before anything is composed.
"""

from __future__ import annotations

from collections.abc import Callable

from mrl.config.assignment import Assignment, find_nearest
from mrl.config.errors import ConfigError
from mrl.config.keys import suggest_keys
from mrl.config.superfluous import drop_superfluous

ROLES = {"actor_rollout_ref.actor": "actor_rollout_ref.model", "critic": "critic.model"}
"""Each trained role's section, and where its model's settings are."""

ALIASES = {
    "actor_rollout_ref.actor.fsdp_config.param_offload": "actor_rollout_ref.actor.megatron.param_offload",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "actor_rollout_ref.actor.megatron.optimizer_offload",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "actor_rollout_ref.ref.megatron.param_offload",
    "critic.model.fsdp_config.param_offload": "critic.megatron.param_offload",
    "critic.model.fsdp_config.optimizer_offload": "critic.megatron.optimizer_offload",
    "actor_rollout_ref.actor.router_replay.mode": "actor_rollout_ref.actor.megatron.router_replay.mode",
    "actor_rollout_ref.rollout.expert_parallel_size": "actor_rollout_ref.rollout.engine_kwargs.sglang.ep_size",
    **{f"{role}.optim.lr_decay_steps": f"{role}.optim.total_training_steps" for role in ROLES},
    **{
        f"{role}.optim.override_optimizer_config.optimizer_cpu_offload": f"{role}.megatron.optimizer_offload"
        for role in ROLES
    },
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
    "actor_rollout_ref.actor.data_loader_seed": "set actor_rollout_ref.actor.megatron.seed",
    "critic.enable": "drop it: a critic is built where algorithm.adv_estimator needs one, as gae does",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": (
        "set algorithm.rollout_correction.rollout_is=token and algorithm.rollout_correction.rollout_is_threshold"
    ),
    "critic.kl_ctrl.kl_coef": "set algorithm.kl_ctrl.kl_coef",
    "actor_rollout_ref.rollout.do_sample": "set actor_rollout_ref.rollout.temperature",
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
            "save_lora_only": "drop it: there are no LoRA adapters, all parameters are trained and saved",
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
    **{
        f"{model}.{name}": "drop it: there are no LoRA adapters, all parameters are trained"
        for model in ROLES.values()
        for name in ("lora", "lora_rank")
    },
    **{
        f"{model}.mtp": "drop it: models are trained and served without multi-token prediction"
        for model in ROLES.values()
    },
    **{f"{section}.megatron.use_megatron_fsdp": "set it to False" for section in (*ROLES, "actor_rollout_ref.ref")},
    **{f"{role}.engine": f"set the same under {role}.megatron" for role in ROLES},
    "model_engine": "set it to megatron, the only training backend",
    "distillation": "drop it: there is no distillation from a teacher",
    "data.image_key": "drop it: models are of text only",
    "actor_rollout_ref.rollout.enable_chunked_prefill": (
        "set actor_rollout_ref.rollout.engine_kwargs.sglang.chunked_prefill_size=-1"
    ),
    "actor_rollout_ref.rollout.enable_prefix_caching": (
        "set actor_rollout_ref.rollout.engine_kwargs.sglang.disable_radix_cache=True"
    ),
    "actor_rollout_ref.rollout.skip_tokenizer_init": "drop it: engines take and give tokens",
    "actor_rollout_ref.rollout.quantization": "drop it: engines compute in the actor's type",
    **{
        f"{section}.rollout": "drop it: a reward model runs on Megatron; a judge that generates is reward.judge"
        for section in ("reward_model", "reward.reward_model")
    },
    "data.tokenizer": "set actor_rollout_ref.model.tokenizer_path",
    "algorithm.filter_groups.max_inflight_gen_batches": (
        "drop it: generation batches of data.gen_batch_size prompts run one after the other"
    ),
}
"""Keys that verl has or had and that are refused, with what to do instead."""

_LENGTHS = ("lr_warmup_steps", "lr_decay_steps", "total_training_steps")
_VALIDATION = "actor_rollout_ref.rollout.val_kwargs"
_FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
_NO_RECOMPUTE = {"recompute_granularity": "null", "recompute_method": "null", "recompute_num_layers": "null"}


_Pass = Callable[[list[Assignment]], tuple[list[Assignment], list[str]]]


def translate(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """The assignments in today's spelling, and lines to log about what was mapped.

    Raises:
        ConfigError: an old and a new spelling of the same key are set to different values.
    """
    passes: tuple[_Pass, ...] = (
        drop_superfluous,
        _drop_profilers_that_are_off,
        _translate_null,
        _translate_do_sample,
        _translate_aliases,
        _translate_recompute,
    )
    notes: list[str] = []
    for translate_some in passes:
        assignments, more = translate_some(assignments)
        notes += more
    return assignments, notes


def explain_unknown(key: str) -> str:
    """One line about a key that does not exist: what replaced it, or which known ones are nearest."""
    target = ALIASES.get(key)
    advice = f"set {target}" if target else find_nearest(ADVICE, key)
    if advice:
        return f"unknown key {key}: {advice}"
    nearest = suggest_keys(key)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see docs/config.md for all keys"
    return f"unknown key {key}: {hint}"


def _drop_profilers_that_are_off(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """Where verl's roles say that none is profiled, its steps are no wish for traces."""
    switches = [item for item in assignments if item.key.endswith(".profiler.enable")]
    if not switches or any(item.plain != "false" for item in switches):
        return assignments, []
    off = [item for item in assignments if item.key.startswith("global_profiler.") or ".profiler." in item.key]
    listed = ", ".join(f"{item.key}={item.value}" for item in off)
    return [item for item in assignments if item not in off], [f"no role is profiled, so nothing is: {listed}"]


def _translate_null(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """verl's null for a length that follows from others is -1 here."""
    keys = {f"{role}.optim.{name}" for role in ROLES for name in _LENGTHS}
    return [
        Assignment(key=item.key, value="-1") if item.key in keys and item.plain == "null" else item
        for item in assignments
    ], []


def _translate_do_sample(assignments: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """Greedy validation is temperature 0; ConfigError where switch and temperature contradict each other."""
    items = {item.key: item for item in assignments}
    temperature = f"{_VALIDATION}.temperature"
    switch, given = items.get(f"{_VALIDATION}.do_sample"), items.get(temperature)
    if switch is None:
        return assignments, []
    told = f"{switch.key}={switch.value}"
    if given is not None and switch.truth == given.is_zero:
        raise ConfigError(f"{told} contradicts {temperature}={given.value}; keep only {temperature}")
    assignments = [item for item in assignments if item is not switch]
    if switch.truth:
        return assignments, [f"{told} needs no setting here: {temperature} decides"]
    return [*assignments, Assignment(key=temperature, value="0")], [f"{told} -> {temperature}=0"]


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
        settings = _FULL_RECOMPUTE if Assignment(key=old, value=values[old]).truth else _NO_RECOMPUTE
        added = [Assignment(key=f"{section}.{name}", value=value) for name, value in settings.items()]
        assignments = [*added, *assignments]
        listed = ", ".join(f"{name}={value}" for name, value in settings.items())
        notes.append(f"{old}={values[old]} -> {section}: {listed}")
    return assignments, notes
