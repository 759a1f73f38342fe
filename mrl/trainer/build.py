"""Joins the backends into a trainer, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.follower import EngineFollower
from mrl.config.build import config_to_dict
from mrl.config.schema import PPOConfig
from mrl.interfaces import USER_ERRORS, Rollout
from mrl.launch.cores import take_share
from mrl.launch.environment import RankEnvironment
from mrl.launch.watchdog import Watchdog
from mrl.observability.console import setup_logging
from mrl.observability.memory import CudaMemory
from mrl.observability.profiler import StepProfiler, phase_range
from mrl.observability.speed import SpeedWatch, time_matmul
from mrl.observability.timers import PhaseTimer
from mrl.observability.trackers import TrackerList, build_trackers
from mrl.parallel.agreement import require_equal
from mrl.reshard.hf_export import copy_model_files
from mrl.rollout.colocated import ColocatedRollout
from mrl.rollout.conversations import ConversationRollout
from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer
from mrl.trainer.collection import SampleCollector
from mrl.trainer.conversations import build_environment, conversation_limits
from mrl.trainer.engines import engine_tags, start_rank
from mrl.trainer.inputs import RunInputs, count_steps
from mrl.trainer.phases import PhaseSwitch
from mrl.trainer.plan import RunPlan
from mrl.trainer.ppo import ActorRole, CriticRole, PPOTrainer, ReferenceRole
from mrl.trainer.resume import checkpoint_root
from mrl.trainer.reward_model import RewardModelStage
from mrl.trainer.rewards import build_reward
from mrl.trainer.roles import TrainingLength, actor_setup, critic_setup, reference_setup, reward_model_setup
from mrl.trainer.samples import SampleWriter
from mrl.trainer.schedules import updates_per_step
from mrl.trainer.scoring import Scorer
from mrl.trainer.settings import (
    advantage_stage,
    baseline_sampling,
    correction_stage,
    group_filter,
    loop_settings,
    overlong_penalty,
    phase_deadlines,
    policy_objective,
    train_sampling,
    val_sampling,
    value_objective,
)
from mrl.trainer.validation import Validator
from mrl.types import Sample


def run_rank(config: PPOConfig, plan: RunPlan, inputs: RunInputs, env: RankEnvironment) -> None:
    """Train, as one rank of the job, in a process of its own."""
    setup_logging(rank=env.rank)
    with build_trainer(config, plan, inputs, env) as trainer:
        trainer.fit()
        dist.barrier()


@contextmanager
def build_trainer(config: PPOConfig, plan: RunPlan, inputs: RunInputs, env: RankEnvironment) -> Iterator[PPOTrainer]:
    """A trainer whose engines, process groups and files are released when the block ends, whatever happens in it.

    Called by all ranks.
    """
    watchdog = Watchdog(env, phase_deadlines(config), run_dir=plan.run_dir, user_errors=USER_ERRORS)
    # The watchdog is the first to hear of an error: the others have to know it before their connections break.
    with ExitStack() as stack, watchdog:
        part = start_rank(config, plan, env, watchdog)
        if part is not None:
            stack.callback(part.shutdown)
        stack.callback(dist.destroy_process_group)
        # After the fork of what forks engines: a process that has used several threads must not fork.
        take_share(env.host_address, requested=config.trainer.threads_per_rank, on_gpu=plan.device == "cuda")
        require_equal(
            str(plan.resume.manifest.step if plan.resume else "none"),
            place=f"host {env.node_rank} ({env.host_address})",
            message="hosts would continue from checkpoints of different steps; keep trainer.default_local_dir on "
            "storage that all of them share",
        )
        yield _Builder(config, plan, inputs, env, stack, PhaseTimer(watchdog.enter, phase_range)).build(part)


@dataclass(frozen=True)
class _Roles:
    """The models of a job, on this rank."""

    actor: MegatronEngine
    critic: MegatronEngine | None
    reference: MegatronEngine | None
    reward_model: MegatronEngine | None

    def present(self) -> list[MegatronEngine]:
        """Those that there are, in the order in which a step uses them."""
        roles = (self.reward_model, self.actor, self.reference, self.critic)
        return [role for role in roles if role is not None]


class _Builder:
    """What the parts of one rank's trainer are built from; whatever needs closing goes on the stack."""

    def __init__(
        self,
        config: PPOConfig,
        plan: RunPlan,
        inputs: RunInputs,
        env: RankEnvironment,
        stack: ExitStack,
        timer: PhaseTimer,
    ) -> None:
        self._config = config
        self._plan = plan
        self._inputs = inputs
        self._env = env
        self._stack = stack
        self._timer = timer
        # Before the roles: what is in use now is the residue of contexts and engines.
        self._device_memory = CudaMemory() if plan.device == "cuda" else None
        self._total_steps = count_steps(config, inputs.prompts)

    def build(self, part: SGLangEngine | EngineFollower | None) -> PPOTrainer:
        """The trainer, continued from its checkpoint if there is one."""
        config, plan, inputs = self._config, self._plan, self._inputs
        roles = self._roles()
        rollout = self._in_conversations(self._rollout(part, roles.actor))
        scorer = self._scorer()
        checkpointer = self._checkpointer(roles)
        phases = self._phases(roles, rollout)
        reward_model = self._reward_model(roles)
        trainer = PPOTrainer(
            settings=loop_settings(config, self._total_steps),
            collector=self._collector(rollout, scorer),
            phases=phases,
            actor=ActorRole(engine=roles.actor, objective=policy_objective(config), schedule=plan.actor_schedule),
            critic=self._critic(roles),
            reference=self._reference(roles),
            correction=correction_stage(config),
            reward_model=reward_model,
            advantages=advantage_stage(config),
            pad_token_id=int(inputs.tokenizer.pad_token_id),
            validator=self._validator(
                rollout,
                scorer,
                partial(reward_model.score_between_rollouts, phases=phases) if reward_model else None,
            ),
            sample_writer=self._sample_writer(config.trainer.rollout_data_dir, "train"),
            trackers=self._trackers(),
            checkpointer=checkpointer,
            compare_speed=SpeedWatch(partial(time_matmul, plan.device)),
            profile=self._profiler(),
        )
        state = checkpointer.load(plan.resume)
        if state is not None:
            trainer.resume(state)
        return trainer

    def _phases(self, roles: _Roles, rollout: Rollout) -> PhaseSwitch:
        plan = self._plan
        return PhaseSwitch(
            rollout=rollout,
            roles=roles.present(),
            engine_tags=engine_tags(self._config, plan),
            device=self._device_memory,
            holds_engine=self._env.rank < plan.num_engines * plan.rollout_tp,
            timer=self._timer,
        )

    def _collector(self, rollout: Rollout, scorer: Scorer) -> SampleCollector:
        config, inputs = self._config, self._inputs
        return SampleCollector(
            prompts=inputs.prompts,
            rollout=rollout,
            scorer=scorer,
            sampling=train_sampling(config, inputs.eos_token_ids),
            n_samples_per_prompt=config.actor_rollout_ref.rollout.n,
            n_prompts=config.data.train_batch_size,
            group_filter=group_filter(config),
            overlong_penalty=overlong_penalty(config),
            baseline_sampling=baseline_sampling(config, inputs.eos_token_ids),
        )

    def _roles(self) -> _Roles:
        config, plan = self._config, self._plan
        samples_per_step = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
        actor_length = TrainingLength(
            steps=max(1, self._total_steps - config.trainer.critic_warmup),
            updates_per_step=updates_per_step(plan.actor_schedule, samples_per_step),
        )
        actor = self._engine(actor_setup(config, plan, actor_length))
        critic = None
        if plan.critic_schedule is not None:
            updates = updates_per_step(plan.critic_schedule, samples_per_step)
            critic_length = TrainingLength(steps=self._total_steps, updates_per_step=updates)
            critic = self._engine(critic_setup(config, plan, critic_length))
        ref_setup = reference_setup(config, plan)
        score_setup = reward_model_setup(config, plan)
        return _Roles(
            actor,
            critic,
            self._engine(ref_setup) if ref_setup else None,
            self._engine(score_setup) if score_setup else None,
        )

    def _engine(self, setup: RoleSetup) -> MegatronEngine:
        engine = build_engine(setup)
        self._stack.callback(engine.close)
        # The next role is built in the memory that this one gives back.
        engine.offload()
        return engine

    def _critic(self, roles: _Roles) -> CriticRole | None:
        schedule = self._plan.critic_schedule
        if roles.critic is None or schedule is None:
            return None
        return CriticRole(engine=roles.critic, objective=value_objective(self._config), schedule=schedule)

    def _reward_model(self, roles: _Roles) -> RewardModelStage | None:
        encoder, settings = self._inputs.reward_encoder, self._config.reward.reward_model
        limit = self._plan.reward_model_limit
        if roles.reward_model is None or encoder is None or limit is None:
            return None
        return RewardModelStage(
            engine=roles.reward_model,
            encoder=encoder,
            limit=limit,
            weight=settings.weight,
            on_failure=settings.on_failure or self._config.reward.on_failure,
        )

    def _reference(self, roles: _Roles) -> ReferenceRole | None:
        limit = self._plan.ref_limit
        if roles.reference is None or limit is None:
            return None
        return ReferenceRole(engine=roles.reference, limit=limit)

    def _rollout(self, part: SGLangEngine | EngineFollower | None, actor: MegatronEngine) -> ColocatedRollout:
        config, plan = self._config, self._plan
        return ColocatedRollout(
            part if isinstance(part, SGLangEngine) else None,
            follower=part if isinstance(part, EngineFollower) else None,
            spec=plan.actor.spec,
            source=actor.export_weights(self._env.host_address),
            max_running_requests=config.actor_rollout_ref.rollout.max_num_seqs,
            max_engine_restarts=config.actor_rollout_ref.rollout.max_engine_restarts,
            weight_version=plan.resume.manifest.weight_version if plan.resume else 0,
            beside=plan.beside,
            copy_engines=config.actor_rollout_ref.rollout.copy_engines,
            reshard_timeout_s=config.trainer.reshard_timeout_s,
            **({"make_room": self._device_memory.reclaim} if self._device_memory else {}),
        )

    def _in_conversations(self, rollout: Rollout) -> Rollout:
        settings = self._config.actor_rollout_ref.rollout.multi_turn
        if not settings.enable:
            return rollout
        environment = build_environment(self._config) if self._env.rank == 0 else None
        if environment is not None:
            self._stack.callback(environment.close)
        encoder = self._inputs.turn_encoder
        assert encoder is not None, "inputs of conversations come with their encoder"
        limits = conversation_limits(self._config)
        return ConversationRollout(rollout, environment, encoder, limits, on_failure=settings.environment.on_failure)

    def _scorer(self) -> Scorer:
        reward_fn = build_reward(self._config.reward) if self._env.rank == 0 else None
        scorer = Scorer(
            reward_fn,
            self._inputs.tokenizer,
            source_rank=0,
            texts_everywhere=self._inputs.reward_encoder is not None,
        )
        self._stack.callback(scorer.close)
        return scorer

    def _validator(
        self,
        rollout: Rollout,
        scorer: Scorer,
        add_model_scores: Callable[[list[Sample]], list[Sample]] | None,
    ) -> Validator:
        config, inputs = self._config, self._inputs
        return Validator(
            prompts=inputs.val.prompts if inputs.val else (),
            batch_size=config.data.val_batch_size,
            rollout=rollout,
            scorer=scorer,
            sampling=val_sampling(config, inputs.eos_token_ids),
            n_samples_per_prompt=config.actor_rollout_ref.rollout.val_kwargs.n,
            sample_writer=self._sample_writer(config.trainer.validation_data_dir, "val"),
            num_logged=config.trainer.log_val_generations,
            add_model_scores=add_model_scores,
        )

    def _checkpointer(self, roles: _Roles) -> Checkpointer:
        config, plan = self._config, self._plan
        trainer, actor, critic = config.trainer, config.actor_rollout_ref.actor, config.critic
        checkpointed = {
            "actor": CheckpointedRole(
                engine=roles.actor,
                record=plan.actor_record,
                max_to_keep=trainer.max_actor_ckpt_to_keep,
                copy_model_files=self._copy_model_files(plan.actor.model_path, actor.megatron.dtype),
                exports_hugging_face=actor.checkpoint.exports_hugging_face,
                async_save=actor.checkpoint.async_save,
                load_contents=actor.checkpoint.load_contents,
            )
        }
        if roles.critic is not None and plan.critic is not None and plan.critic_record is not None:
            checkpointed["critic"] = CheckpointedRole(
                engine=roles.critic,
                record=plan.critic_record,
                max_to_keep=trainer.max_critic_ckpt_to_keep,
                copy_model_files=self._copy_model_files(plan.critic.model_path, critic.megatron.dtype),
                async_save=critic.checkpoint.async_save,
                load_contents=critic.checkpoint.load_contents,
            )
        checkpointer = Checkpointer(
            root=checkpoint_root(plan.run_dir),
            roles=checkpointed,
            save_freq=trainer.save_freq,
            total_steps=self._total_steps,
        )
        self._stack.callback(checkpointer.close)
        return checkpointer

    def _copy_model_files(self, model_path: Path, dtype: str) -> Callable[[Path], None]:
        return partial(copy_model_files, model_path, self._plan.tokenizer_path, dtype=dtype)

    def _sample_writer(self, configured: str | None, kind: str) -> SampleWriter:
        if self._env.rank != 0:
            return SampleWriter(None)
        folder = Path(configured).expanduser() if configured else self._plan.run_dir / "samples" / kind
        writer = SampleWriter(folder)
        self._stack.callback(writer.close)
        return writer

    def _profiler(self) -> StepProfiler:
        steps, env = self._config.trainer.profiled_steps(self._env.rank), self._env
        return StepProfiler(steps, folder=self._plan.run_dir / "profile", rank=env.rank, device=self._plan.device)

    def _trackers(self) -> TrackerList:
        if self._env.rank != 0:
            return TrackerList([])
        trainer = self._config.trainer
        trackers = build_trackers(
            trainer.logger,
            run_dir=self._plan.run_dir,
            total_steps=self._total_steps,
            project=trainer.project_name,
            experiment=trainer.experiment_name,
            settings=config_to_dict(self._config),
        )
        self._stack.callback(trackers.close)
        return trackers
