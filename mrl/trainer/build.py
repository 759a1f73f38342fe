"""Joins the backends into a trainer, on one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mrl.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.backends.sglang.engine import SGLangEngine
from mrl.config.algorithm import KLCtrlConfig
from mrl.config.frozen import thaw
from mrl.config.reward import RewardConfig
from mrl.config.schema import PPOConfig
from mrl.launch.environment import RankEnvironment
from mrl.launch.rendezvous import init_process_group
from mrl.observability.console import setup_logging
from mrl.observability.memory import device_memory_in_use_gib
from mrl.observability.trackers import TrackerList, build_trackers
from mrl.reshard.hf_export import copy_model_files
from mrl.rewards.build import ConcurrentReward, build_reward_fn
from mrl.rollout.colocated import ColocatedRollout
from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer
from mrl.trainer.inputs import RunInputs, count_steps
from mrl.trainer.phases import ENGINE_TAGS, PhaseSwitch
from mrl.trainer.plan import RunPlan
from mrl.trainer.ppo import PPOSettings, PPOTrainer
from mrl.trainer.resume import checkpoint_root
from mrl.trainer.roles import actor_setup, critic_setup, reference_setup
from mrl.trainer.samples import SampleWriter
from mrl.trainer.schedules import updates_per_step
from mrl.trainer.scoring import Scorer
from mrl.trainer.validation import Validator
from mrl.types import SamplingParams


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
    with ExitStack() as stack:
        sglang = _start(config, plan, env)
        if sglang is not None:
            stack.callback(sglang.shutdown)
        stack.callback(dist.destroy_process_group)
        yield _join(config, plan, inputs, env, sglang, stack)


def _start(config: PPOConfig, plan: RunPlan, env: RankEnvironment) -> SGLangEngine | None:
    """This rank's engine, if it leads one, and torch.distributed.

    An engine forks its processes, so it comes first; the process group forms while they load.
    """
    join = partial(_init_process_group, config, plan, env)
    leads = env.rank % plan.rollout_tp == 0 and env.rank // plan.rollout_tp < plan.num_engines
    if leads:
        engine = _start_engine(config, plan, env, during_start=join)
        # The trainer is built in the memory that the engine will use later.
        engine.release_memory(_engine_tags(config, plan))
        return engine
    join()
    return None


def _init_process_group(config: PPOConfig, plan: RunPlan, env: RankEnvironment) -> None:
    backend = "gloo"
    if plan.device == "cuda":
        torch.cuda.set_device(env.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    init_process_group(env, backend=backend, timeout=timedelta(seconds=config.trainer.phase_timeout_s))


def _start_engine(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, *, during_start: Callable[[], None]
) -> SGLangEngine:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    context_length = config.data.max_prompt_length + config.data.max_response_length
    on_gpu = plan.device == "cuda"
    arguments = {"base_gpu_id": env.local_rank, "disable_cuda_graph": rollout.enforce_eager} if on_gpu else {}
    return SGLangEngine.start(
        plan.actor.model_path,
        tp_size=plan.rollout_tp,
        dtype=rollout.dtype,
        device=plan.device,
        context_length=context_length,
        max_running_requests=rollout.max_num_seqs,
        max_total_tokens=None if on_gpu else rollout.max_num_seqs * (context_length + 1),
        mem_fraction_static=rollout.gpu_memory_utilization if on_gpu else None,
        seed=trainer.seed + env.rank,
        start_timeout_s=trainer.engine_start_timeout_s,
        call_timeout_s=trainer.engine_call_timeout_s,
        during_start=during_start,
        engine_kwargs={
            "chunked_prefill_size": rollout.max_num_batched_tokens,
            **arguments,
            **thaw(rollout.engine_kwargs.sglang),
        },
    )


def _engine_tags(config: PPOConfig, plan: RunPlan) -> tuple[str, ...]:
    """What engines give back while the trainer works."""
    releases = plan.device == "cuda" and config.actor_rollout_ref.rollout.free_cache_engine
    return ENGINE_TAGS if releases else ()


def _join(
    config: PPOConfig,
    plan: RunPlan,
    inputs: RunInputs,
    env: RankEnvironment,
    sglang: SGLangEngine | None,
    stack: ExitStack,
) -> PPOTrainer:
    prompts = inputs.prompts
    total_steps = count_steps(config, prompts)
    samples_per_step = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    per_actor_step = updates_per_step(plan.actor_schedule, samples_per_step)
    per_critic_step = updates_per_step(plan.critic_schedule, samples_per_step)

    def build(setup: RoleSetup) -> MegatronEngine:
        engine = build_engine(setup)
        stack.callback(engine.close)
        return engine

    actor_steps = total_steps - config.trainer.critic_warmup
    actor = build(actor_setup(config, plan, total_updates=max(1, actor_steps * per_actor_step)))
    critic = build(critic_setup(config, plan, total_updates=total_steps * per_critic_step))
    ref_setup = reference_setup(config, plan)
    reference = build(ref_setup) if ref_setup else None
    rollout = ColocatedRollout(
        sglang,
        spec=plan.actor.spec,
        source=actor.export_weights(),
        max_running_requests=config.actor_rollout_ref.rollout.max_num_seqs,
        timeout=timedelta(seconds=config.trainer.phase_timeout_s),
        weight_version=plan.resume.manifest.weight_version if plan.resume else 0,
    )
    scorer = _build_scorer(config, inputs, env)
    stack.callback(scorer.close)
    checkpointer = _checkpointer(config, plan, actor, critic, total_steps)
    trainer = PPOTrainer(
        settings=_settings(config, total_steps),
        actor=actor,
        critic=critic,
        reference=reference,
        rollout=rollout,
        phases=PhaseSwitch(
            rollout=rollout,
            roles=[role for role in (actor, critic, reference) if role is not None],
            engine_tags=_engine_tags(config, plan),
            allocated_gib=device_memory_in_use_gib,
        ),
        scorer=scorer,
        prompts=prompts,
        sampling=_sampling(config, inputs),
        policy_objective=_policy_objective(config),
        value_objective=_value_objective(config),
        kl_controller=_kl_controller(config.algorithm.kl_ctrl),
        actor_schedule=plan.actor_schedule,
        critic_schedule=plan.critic_schedule,
        ref_micro_batch_size=plan.ref_micro_batch_size,
        pad_token_id=int(inputs.tokenizer.pad_token_id),
        validator=_validator(config, plan, inputs, rollout, scorer, env),
        sample_writer=_sample_writer(config.trainer.rollout_data_dir, plan.run_dir / "samples" / "train", env),
        trackers=_trackers(config, plan, env, stack, total_steps),
        checkpointer=checkpointer,
    )
    state = checkpointer.load(plan.resume)
    if state is not None:
        trainer.resume(state)
    return trainer


def _settings(config: PPOConfig, total_steps: int) -> PPOSettings:
    algorithm, trainer = config.algorithm, config.trainer
    return PPOSettings(
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        kl_penalty=algorithm.kl_penalty,
        use_kl_in_reward=algorithm.use_kl_in_reward,
        n_samples_per_prompt=config.actor_rollout_ref.rollout.n,
        critic_warmup=trainer.critic_warmup,
        total_steps=total_steps,
        test_freq=trainer.test_freq,
        val_before_train=trainer.val_before_train,
        val_only=trainer.val_only,
    )


def _sampling(config: PPOConfig, inputs: RunInputs) -> SamplingParams:
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        max_new_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=inputs.eos_token_ids,
        ignore_eos=rollout.ignore_eos,
    )


def _policy_objective(config: PPOConfig) -> PolicyObjective:
    actor = config.actor_rollout_ref.actor
    return PolicyObjective(
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        entropy_coeff=actor.entropy_coeff,
        use_kl_loss=actor.use_kl_loss,
        kl_loss_coef=actor.kl_loss_coef,
        kl_loss_type=actor.kl_loss_type,
    )


def _value_objective(config: PPOConfig) -> ValueObjective:
    critic = config.critic
    return ValueObjective(
        cliprange_value=critic.cliprange_value,
        loss_agg_mode=critic.loss_agg_mode,
        loss_scale_factor=critic.loss_scale_factor or config.data.max_response_length,
    )


def _kl_controller(settings: KLCtrlConfig) -> KLController:
    if settings.type == "adaptive":
        return AdaptiveKLController(settings.kl_coef, target_kl=settings.target_kl, horizon=settings.horizon)
    return FixedKLController(settings.kl_coef)


def _build_scorer(config: PPOConfig, inputs: RunInputs, env: RankEnvironment) -> Scorer:
    reward_fn = _reward_fn(config.reward) if env.rank == 0 else None
    return Scorer(reward_fn, inputs.tokenizer, source_rank=0)


def _reward_fn(settings: RewardConfig) -> ConcurrentReward:
    function = settings.custom_reward_function
    return build_reward_fn(
        path=function.path,
        name=function.name,
        reward_kwargs=thaw(function.reward_kwargs),
        num_workers=min(settings.num_workers, os.cpu_count() or 1),
        timeout_s=settings.timeout_s,
        on_failure=settings.on_failure,
    )


def _validator(
    config: PPOConfig,
    plan: RunPlan,
    inputs: RunInputs,
    rollout: ColocatedRollout,
    scorer: Scorer,
    env: RankEnvironment,
) -> Validator:
    settings = config.actor_rollout_ref.rollout.val_kwargs
    return Validator(
        prompts=inputs.val.prompts if inputs.val else (),
        batch_size=config.data.val_batch_size,
        rollout=rollout,
        scorer=scorer,
        sampling=SamplingParams(
            max_new_tokens=config.data.max_response_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=inputs.eos_token_ids,
        ),
        n_samples_per_prompt=settings.n,
        sample_writer=_sample_writer(config.trainer.validation_data_dir, plan.run_dir / "samples" / "val", env),
        num_logged=config.trainer.log_val_generations,
    )


def _checkpointer(
    config: PPOConfig, plan: RunPlan, actor: MegatronEngine, critic: MegatronEngine, total_steps: int
) -> Checkpointer:
    trainer, shared = config.trainer, config.actor_rollout_ref
    finish_export = partial(
        copy_model_files,
        plan.actor.model_path,
        Path(shared.model.tokenizer_path or plan.actor.model_path).expanduser(),
        dtype=shared.actor.megatron.dtype,
    )
    return Checkpointer(
        root=checkpoint_root(plan.run_dir),
        roles={
            "actor": CheckpointedRole(
                engine=actor,
                record=plan.actor_record,
                max_to_keep=trainer.max_actor_ckpt_to_keep,
                finish_export=finish_export if shared.actor.checkpoint.exports_hugging_face else None,
            ),
            "critic": CheckpointedRole(
                engine=critic, record=plan.critic_record, max_to_keep=trainer.max_critic_ckpt_to_keep
            ),
        },
        save_freq=trainer.save_freq,
        total_steps=total_steps,
    )


def _sample_writer(configured: str | None, default: Path, env: RankEnvironment) -> SampleWriter:
    if env.rank != 0:
        return SampleWriter(None)
    return SampleWriter(Path(configured).expanduser() if configured else default)


def _trackers(
    config: PPOConfig, plan: RunPlan, env: RankEnvironment, stack: ExitStack, total_steps: int
) -> TrackerList:
    if env.rank != 0:
        return TrackerList([])
    trackers = build_trackers(config.trainer.logger, run_dir=plan.run_dir, total_steps=total_steps)
    stack.callback(trackers.close)
    return trackers
