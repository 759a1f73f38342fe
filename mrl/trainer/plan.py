"""What a configuration means for one job: paths, layouts and sizes, checked before anything starts.

Pure: no process group, no engine, no device memory. The launcher runs it once, so that bad input ends the job with one
message before a rank exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mrl.config.megatron import MegatronConfig, TrainableMegatronConfig
from mrl.config.schema import PPOConfig
from mrl.data.embedded import resolve_embedded
from mrl.reshard.hf_export import list_model_files
from mrl.reshard.spec import ModelSpec
from mrl.trainer.engine_plan import check_senders, count_engines, ranks_beside_engines
from mrl.trainer.job_memory import plan_memory, role_memory
from mrl.trainer.machine import Device, Machine, find_machine
from mrl.trainer.manifest import RoleRecord, describe_role
from mrl.trainer.memory_plan import MemoryPlan
from mrl.trainer.resume import CurrentRole, ResumePoint, find_resume_point
from mrl.trainer.role_plan import RolePlan, plan_reward_model, plan_role
from mrl.trainer.schedules import actor_schedule, critic_schedule, reference_limit, reward_model_limit
from mrl.trainer.updates import UpdateSchedule
from mrl.types import MicroBatchLimit


@dataclass(kw_only=True, frozen=True)
class RunPlan:
    """One job, resolved."""

    device: Device
    world_size: int
    run_dir: Path
    actor: RolePlan
    critic: RolePlan | None
    reference: RolePlan | None
    reward_model: RolePlan | None
    rollout_tp: int
    num_engines: int
    beside: tuple[int, ...]
    """For every engine rank, engine by engine, the trainer rank whose GPU it shares."""
    actor_schedule: UpdateSchedule
    critic_schedule: UpdateSchedule | None
    ref_limit: MicroBatchLimit | None
    reward_model_limit: MicroBatchLimit | None
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    actor_record: RoleRecord
    """What the actor's checkpoints hold."""
    critic_record: RoleRecord | None
    tokenizer_path: Path
    memory: MemoryPlan
    resume: ResumePoint | None
    """The checkpoint that the run continues."""

    @property
    def memory_title(self) -> str:
        """Of the table of `memory`."""
        return "Memory, GiB per GPU" if self.device == "cuda" else "Memory, GiB over all hosts"

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every line a person wants to see before the run."""
        return [
            ("device", f"{self.device}, {self.world_size} ranks"),
            ("actor", str(self.actor)),
            ("critic", str(self.critic) if self.critic else "none: advantages need no values"),
            ("reference", str(self.reference) if self.reference else "none: no KL term is configured"),
            *([("reward model", str(self.reward_model))] if self.reward_model else []),
            ("rollout", f"{self.num_engines} x SGLang at TP{self.rollout_tp}"),
            ("files", str(self.run_dir)),
            *([("resumes", str(self.resume))] if self.resume else []),
        ]


def plan_run(config: PPOConfig, machine: Machine | None = None) -> RunPlan:
    """The job that `config` asks for, on the given kind of host; by default on this one.

    Raises:
        ValueError: a path that does not exist, a layout or size that does not fit; says what to change.
    """
    machine = machine or find_machine(config.trainer.device)
    run_dir = run_folder(config)
    shared = config.actor_rollout_ref
    files = _Files(run_dir / "embedded")
    actor_path = files.model(shared.model.path)
    actor = plan_role(config, "actor_rollout_ref.actor", shared.actor.megatron, actor_path, machine, trained=True)
    critic = None
    if config.needs_critic:
        critic_path = files.model(config.critic.model.path)
        critic = plan_role(config, "critic", config.critic.megatron, critic_path, machine, trained=True)
    reference = None
    if config.needs_reference:
        reference = plan_role(config, "actor_rollout_ref.ref", shared.ref.megatron, actor_path, machine, trained=False)
    reward_model = plan_reward_model(config, machine)
    _check_lengths(config, {"actor": actor, **({"critic": critic} if critic else {})})
    actor_record = _describe(actor, shared.actor.megatron, is_critic=False)
    critic_record = _describe(critic, config.critic.megatron, is_critic=True) if critic else None
    tokenizer_path = Path(shared.model.tokenizer_path or actor_path).expanduser()
    current = {"actor": _current(actor, actor_record, tokenizer_path)}
    if critic and critic_record:
        current["critic"] = _current(critic, critic_record, tokenizer_path)
    trainer, num_engines = config.trainer, count_engines(config, actor.spec, machine.device)
    check_senders(config, actor.layout, num_engines)
    return RunPlan(
        device=machine.device,
        world_size=config.trainer.world_size,
        run_dir=run_dir,
        actor=actor,
        critic=critic,
        reference=reference,
        reward_model=reward_model,
        rollout_tp=shared.rollout.tensor_model_parallel_size,
        num_engines=num_engines,
        beside=ranks_beside_engines(config, actor.spec, actor.layout, num_engines, machine.device),
        memory=_plan_memory(config, machine, actor, critic, reference, reward_model, num_engines=num_engines),
        actor_schedule=actor_schedule(config, actor.layout),
        critic_schedule=critic_schedule(config, critic.layout) if critic else None,
        ref_limit=reference_limit(config, reference.layout) if reference else None,
        reward_model_limit=reward_model_limit(config, reward_model.layout) if reward_model else None,
        train_files=files.data(config.data.train_files),
        val_files=files.data(config.data.val_files) if trainer.validates else (),
        actor_record=actor_record,
        critic_record=critic_record,
        tokenizer_path=tokenizer_path,
        resume=find_resume_point(trainer.resume_mode, run_dir, trainer.resume_from_path, current),
    )


@dataclass(kw_only=True, frozen=True)
class ShapePlan:
    """What of a job follows from its configuration and the actor's shape alone."""

    actor: RolePlan
    critic: RolePlan | None
    reference: RolePlan | None
    num_engines: int
    memory: MemoryPlan


def plan_shape(config: PPOConfig, machine: Machine, spec: ModelSpec) -> ShapePlan:
    """The layouts and the memory of a job whose actor, critic and reference all have the shape `spec`.

    Looks at no file: there need be no model, data or tokenizer.

    Raises:
        ValueError: as `plan_run`.
    """

    def plan_part(section: str, megatron: MegatronConfig, *, trained: bool) -> RolePlan:
        return plan_role(config, section, megatron, Path(), machine, trained=trained, spec=spec)

    shared = config.actor_rollout_ref
    actor = plan_part("actor_rollout_ref.actor", shared.actor.megatron, trained=True)
    critic = plan_part("critic", config.critic.megatron, trained=True) if config.needs_critic else None
    reference = None
    if config.needs_reference:
        reference = plan_part("actor_rollout_ref.ref", shared.ref.megatron, trained=False)
    num_engines = count_engines(config, spec, machine.device)
    return ShapePlan(
        actor=actor,
        critic=critic,
        reference=reference,
        num_engines=num_engines,
        memory=_plan_memory(config, machine, actor, critic, reference, None, num_engines=num_engines),
    )


def run_folder(config: PPOConfig) -> Path:
    """Where the run's outputs are."""
    return Path(config.trainer.default_local_dir).expanduser().absolute()


class _Files:
    """Paths as the user wrote them, made absolute; embedded ones are written to a folder first."""

    def __init__(self, embedded_folder: Path) -> None:
        self._folder = embedded_folder

    def model(self, path: str) -> Path:
        folder = Path(resolve_embedded(path, self._folder)).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"model folder {path} does not exist; give a local folder with config.json, *.safetensors and the "
                "tokenizer files (`hf download NAME --local-dir DIR` fetches one)"
            )
        return folder.absolute()

    def data(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Path(resolve_embedded(path, self._folder)).expanduser().absolute()) for path in paths)


def _plan_memory(
    config: PPOConfig,
    machine: Machine,
    actor: RolePlan,
    critic: RolePlan | None,
    reference: RolePlan | None,
    reward_model: RolePlan | None,
    *,
    num_engines: int,
) -> MemoryPlan:
    shared = config.actor_rollout_ref
    roles = (
        ("actor", actor, shared.actor.megatron, True),
        ("critic", critic, config.critic.megatron, True),
        ("reference", reference, shared.ref.megatron, False),
        ("reward model", reward_model, config.reward.reward_model.megatron, False),
    )
    held = [
        role_memory(name, role.spec, role.layout, megatron, trained=trained)
        for name, role, megatron, trained in roles
        if role is not None
    ]
    return plan_memory(config, machine, held, actor=actor.spec, num_engines=num_engines)


def _describe(role: RolePlan, megatron: TrainableMegatronConfig, *, is_critic: bool) -> RoleRecord:
    return describe_role(
        role.spec,
        role.layout,
        dtype=megatron.dtype,
        distributed_optimizer=megatron.use_distributed_optimizer,
        is_critic=is_critic,
    )


def _current(role: RolePlan, record: RoleRecord, tokenizer_path: Path) -> CurrentRole:
    return CurrentRole(record=record, model_files=list_model_files(role.model_path, tokenizer_path))


def _check_lengths(config: PPOConfig, roles: Mapping[str, RolePlan]) -> None:
    needed = config.data.max_length
    for name, role in roles.items():
        limit = role.spec.max_position_embeddings
        if needed > limit:
            raise ValueError(
                f"data.max_prompt_length + data.max_response_length = {needed} exceeds the {name} model's "
                f"max_position_embeddings = {limit}; lower one of them"
            )
