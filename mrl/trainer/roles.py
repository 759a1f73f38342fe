"""From configuration sections to the plain values that the Megatron backend takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.offload import OffloadSettings
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup
from mrl.config.megatron import MegatronConfig, TrainableMegatronConfig
from mrl.config.optim import OptimConfig
from mrl.config.schema import PPOConfig
from mrl.trainer.plan import RunPlan
from mrl.trainer.role_plan import RolePlan
from mrl.trainer.settings import phase_deadlines


@dataclass(kw_only=True, frozen=True)
class TrainingLength:
    """Of one role."""

    steps: int
    """PPO steps in which it is trained."""
    updates_per_step: int
    """Optimizer steps of each."""


def actor_setup(config: PPOConfig, plan: RunPlan, length: TrainingLength) -> RoleSetup:
    """The policy that is trained."""
    actor = config.actor_rollout_ref.actor
    setup = _trained("actor", config, plan, plan.actor, actor.megatron, optimizer_settings(actor.optim, length))
    return replace(setup, router_replay=config.replays_routers)


def critic_setup(config: PPOConfig, plan: RunPlan, length: TrainingLength) -> RoleSetup:
    """The value function."""
    critic = config.critic
    assert plan.critic is not None, "this run has no critic"
    return _trained("critic", config, plan, plan.critic, critic.megatron, optimizer_settings(critic.optim, length))


def reference_setup(config: PPOConfig, plan: RunPlan) -> RoleSetup | None:
    """The frozen policy, where a KL term needs it."""
    if plan.reference is None:
        return None
    return _setup("reference", config, plan, plan.reference, config.actor_rollout_ref.ref.megatron)


def reward_model_setup(config: PPOConfig, plan: RunPlan) -> RoleSetup | None:
    """The classifier that scores samples, if there is one."""
    if plan.reward_model is None:
        return None
    return _setup("reward_model", config, plan, plan.reward_model, config.reward.reward_model.megatron)


def _trained(
    kind: Literal["actor", "critic"],
    config: PPOConfig,
    plan: RunPlan,
    role: RolePlan,
    megatron: TrainableMegatronConfig,
    optimizer: OptimizerSettings,
) -> RoleSetup:
    return _setup(
        kind,
        config,
        plan,
        role,
        megatron,
        optimizer=optimizer,
        data_parallel=DataParallelSettings(
            use_distributed_optimizer=megatron.use_distributed_optimizer, **megatron.override_ddp_config
        ),
    )


def _setup(
    kind: Literal["actor", "critic", "reference", "reward_model"],
    config: PPOConfig,
    plan: RunPlan,
    role: RolePlan,
    megatron: MegatronConfig,
    *,
    optimizer: OptimizerSettings | None = None,
    data_parallel: DataParallelSettings | None = None,
) -> RoleSetup:
    return RoleSetup(
        kind=kind,
        model_path=str(role.weights_path),
        spec=role.spec,
        layout=role.layout,
        dtype=megatron.dtype,  # type: ignore[arg-type]
        device=plan.device,
        seed=megatron.seed,
        temperature=config.actor_rollout_ref.rollout.temperature,
        packed=megatron.use_remove_padding,
        optimizer=optimizer,
        data_parallel=data_parallel or DataParallelSettings(),
        recompute=_recompute(megatron),
        offload=_offload(kind, megatron),
        timeout_s=phase_deadlines(config).collective_s,
    )


def optimizer_settings(optim: OptimConfig, length: TrainingLength) -> OptimizerSettings:
    """The schedule, which is configured in PPO steps, in the optimizer's."""
    decay_steps = optim.total_training_steps if optim.total_training_steps > 0 else length.steps
    warmup_steps = optim.lr_warmup_steps if optim.lr_warmup_steps >= 0 else optim.lr_warmup_steps_ratio * decay_steps
    is_constant = optim.lr_decay_style == "constant"
    return OptimizerSettings(
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        lr_warmup_steps=int(warmup_steps * length.updates_per_step),
        lr_warmup_init=optim.lr_warmup_init,
        lr_decay_style=optim.lr_decay_style,
        lr_decay_steps=None if is_constant else decay_steps * length.updates_per_step,
        min_lr=optim.min_lr,
        eps=optim.override_optimizer_config.get("adam_eps", OptimizerSettings.eps),
    )


def _offload(kind: str, megatron: MegatronConfig) -> OffloadSettings:
    """verl's meaning: `param_offload` releases gradients, too. An actor's parameters stay, for engines to read."""
    parameters = megatron.param_offload and kind != "actor"
    if not isinstance(megatron, TrainableMegatronConfig):
        return OffloadSettings(parameters=parameters)
    return OffloadSettings(
        parameters=parameters,
        gradients=megatron.grad_offload or megatron.param_offload,
        optimizer=megatron.optimizer_offload,
    )


def _recompute(megatron: MegatronConfig) -> Recompute:
    overrides = megatron.override_transformer_config
    known = {name: overrides.get(f"recompute_{name}") for name in ("granularity", "method", "num_layers")}
    return Recompute(**known, modules=tuple(overrides.get("recompute_modules") or ("core_attn",)))
