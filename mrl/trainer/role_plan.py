"""One role's model and layout, from its part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mrl.config.megatron import ActorMegatronConfig, MegatronConfig, TrainableMegatronConfig
from mrl.config.schema import PPOConfig
from mrl.convert.locate import find_role
from mrl.convert.megatron_weights import MegatronWeights
from mrl.interfaces import CheckpointError
from mrl.parallel.auto_layout import BytesPerParameter, check_layout, choose_layout
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import count_params
from mrl.reshard.spec import ModelSpec, load_classifier_spec, load_spec
from mrl.trainer.machine import Machine

# Shares of a rank's memory that an automatic layout may fill with a role's weights, gradients and optimizer state.
_TRAINED_SHARE = 0.35
_OFFLOADED_SHARE = 0.7
"""With the optimizer offloaded between phases, actor and critic take turns."""
_REFERENCE_SHARE = 0.1


@dataclass(kw_only=True, frozen=True)
class RolePlan:
    """One role's model and its layout."""

    model_path: Path
    weights_path: Path
    """Hugging Face folder or checkpoint with the initial weights."""
    spec: ModelSpec
    layout: ParallelLayout

    def __str__(self) -> str:
        return f"{self.spec.family}, {count_params(self.spec) / 1e6:.1f} M parameters, {self.layout}"


def plan_reward_model(config: PPOConfig, machine: Machine) -> RolePlan | None:
    """The reward model's plan, None where the run has none; ValueError as `plan_role`."""
    settings = config.reward.reward_model
    if not settings.enable:
        return None
    assert settings.model_path is not None, "the configuration requires it"
    folder = Path(settings.model_path).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"reward.reward_model.model_path = {settings.model_path} does not exist; give a local folder")
    spec = load_classifier_spec(folder)
    return plan_role(config, "reward.reward_model", settings.megatron, folder, machine, spec=spec, trained=False)


def plan_role(
    config: PPOConfig,
    section: str,
    megatron: MegatronConfig,
    path: Path,
    machine: Machine,
    *,
    trained: bool,
    spec: ModelSpec | None = None,
) -> RolePlan:
    """The role of the configuration's `section`.

    Args:
        path: folder of its model; not read where `spec` is given.

    Raises:
        ValueError: the layout does not fit the model or the job, or the weights are another model's.
    """
    spec = spec or load_spec(path)
    try:
        layout = _layout(config, megatron, spec, machine, trained=trained)
        check_layout(layout, spec)
        _check_experts(megatron, spec)
        weights_path = _weights_path(megatron, path, spec)
    except ValueError as error:
        raise ValueError(f"{section}.megatron: {error}") from error
    return RolePlan(model_path=path, weights_path=weights_path, spec=spec, layout=layout)


def _check_experts(megatron: MegatronConfig, spec: ModelSpec) -> None:
    if isinstance(megatron, ActorMegatronConfig) and megatron.router_replay.mode != "disabled" and spec.moe is None:
        raise ValueError(
            f"router_replay.mode = {megatron.router_replay.mode} replays the choice of experts, and a {spec.family} "
            "model has none; set it to disabled"
        )


def _weights_path(megatron: MegatronConfig, model: Path, spec: ModelSpec) -> Path:
    if not megatron.use_dist_checkpointing:
        return model
    assert megatron.dist_checkpointing_path is not None, "the configuration requires it"
    folder = Path(megatron.dist_checkpointing_path).expanduser().absolute()
    try:
        # Opened to have another model's refused here, by name.
        MegatronWeights(find_role(folder).dist, spec)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"dist_checkpointing_path: {error}") from error
    return folder


def _layout(
    config: PPOConfig, megatron: MegatronConfig, spec: ModelSpec, machine: Machine, *, trained: bool
) -> ParallelLayout:
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if tp is None and pp is None:
        chosen = _automatic_layout(config, megatron, spec, machine, trained=trained)
        tp, pp = chosen.tp, chosen.pp
    return ParallelLayout(
        world_size=config.trainer.world_size,
        tp=tp or 1,
        pp=pp or 1,
        vpp=megatron.virtual_pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        ep=megatron.expert_model_parallel_size,
        etp=megatron.expert_tensor_parallel_size or 1,
        sequence_parallel=megatron.sequence_parallel and (tp or 1) > 1,
    )


def _automatic_layout(
    config: PPOConfig, megatron: MegatronConfig, spec: ModelSpec, machine: Machine, *, trained: bool
) -> ParallelLayout:
    trainer = config.trainer
    optimizer_offload = isinstance(megatron, TrainableMegatronConfig) and megatron.optimizer_offload
    share = _REFERENCE_SHARE if not trained else _OFFLOADED_SHARE if optimizer_offload else _TRAINED_SHARE
    return choose_layout(
        spec,
        # Context-parallel ranks are replicas as far as memory goes.
        world_size=trainer.world_size // megatron.context_parallel_size,
        gpus_per_node=trainer.n_gpus_per_node,
        memory_bytes_per_rank=int(share * machine.rank_bytes(trainer.n_gpus_per_node)),
        bytes_per_parameter=BytesPerParameter.of(weight=4 if megatron.dtype == "float32" else 2, trained=trained),
        ep=megatron.expert_model_parallel_size,
        etp=megatron.expert_tensor_parallel_size or 1,
    )
