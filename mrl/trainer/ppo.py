"""The PPO loop. It reads as the algorithm does; engines, ranks and devices are behind `mrl.interfaces`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.algorithms.advantages import compute_explained_variance, compute_gae, compute_token_rewards, whiten
from mrl.algorithms.kl import KLController, apply_kl_penalty, compute_kl
from mrl.algorithms.masking import masked_mean
from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.data.loader import PromptLoader
from mrl.interfaces import Rollout, TrainEngine
from mrl.observability.memory import peak_memory_gib
from mrl.observability.trackers import TrackerList
from mrl.rollout.batch import build_batch
from mrl.trainer.checkpoint import Checkpointer, LoopState
from mrl.trainer.phases import PhaseSwitch
from mrl.trainer.samples import SampleWriter, summarize_samples
from mrl.trainer.scoring import Scorer
from mrl.trainer.validation import Validator
from mrl.types import Prompt, Sample, SamplingParams, TrainBatch

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(kw_only=True, frozen=True)
class UpdateSchedule:
    """How one role walks over the samples of a step."""

    mini_batch_size: int
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples per forward pass and data-parallel rank, with gradients."""
    forward_micro_batch_size: int
    """The same without gradients."""
    epochs: int
    shuffle: bool
    seed: int


@dataclass(kw_only=True, frozen=True)
class PPOSettings:
    """The numbers of the algorithm."""

    gamma: float
    lam: float
    kl_penalty: str
    use_kl_in_reward: bool
    n_samples_per_prompt: int
    critic_warmup: int
    total_steps: int
    test_freq: int
    val_before_train: bool
    val_only: bool


@dataclass(kw_only=True)
class PPOTrainer:
    """One training run over engines that are already built."""

    settings: PPOSettings
    actor: TrainEngine
    critic: TrainEngine
    reference: TrainEngine | None
    rollout: Rollout
    phases: PhaseSwitch
    scorer: Scorer
    prompts: PromptLoader
    sampling: SamplingParams
    policy_objective: PolicyObjective
    value_objective: ValueObjective
    kl_controller: KLController
    actor_schedule: UpdateSchedule
    critic_schedule: UpdateSchedule
    ref_micro_batch_size: int
    pad_token_id: int
    validator: Validator
    sample_writer: SampleWriter
    trackers: TrackerList
    checkpointer: Checkpointer | None = None

    def __post_init__(self) -> None:
        self._timer = self.phases.timer
        self._completed_steps = 0

    def fit(self) -> Metrics:
        """Run every step that is left; returns the metrics of the last one. Called by all ranks."""
        settings, completed = self.settings, self._completed_steps
        reshard = self.phases.to_rollout()
        if settings.val_only or (settings.val_before_train and completed == 0):
            self.trackers.log({**self.validator.run(step=completed), **reshard}, step=completed)
        elif completed and self._validates_at(completed):
            # The engine's random numbers and cached prefixes after it are what the next rollout began with.
            self.validator.run(step=completed)
        if settings.val_only:
            return reshard
        metrics: Metrics = {}
        for step in range(completed + 1, settings.total_steps + 1):
            metrics = self.step(next(self.prompts), step=step)
            if self._validates_at(step):
                metrics |= self.validator.run(step=step)
            self.trackers.log(metrics, step=step)
        return metrics

    def state(self, *, step: int) -> LoopState:
        """What the loop has to remember once the updates of `step` are made and before engines pull their result."""
        return LoopState(
            step=step,
            weight_version=self.rollout.weight_version + 1,
            prompts=self.prompts.state_dict(),
            kl_controller=self.kl_controller.state_dict(),
        )

    def resume(self, state: LoopState) -> None:
        """Go on after `state.step`; roles and rollout have been put into their state of then.

        Raises:
            ValueError: the state belongs to other prompts or another order of them.
        """
        self.prompts.load_state_dict(state.prompts)
        self.kl_controller.load_state_dict(state.kl_controller)
        self._completed_steps = state.step

    def step(self, prompts: list[Prompt], *, step: int) -> Metrics:
        """One PPO step: rollout, rewards, log-probs, values, advantages, updates, reshard."""
        with self._timer("step"):
            samples, metrics = self._roll_out(prompts)
            with self._timer("reward"):
                samples = self.scorer.score(samples)
            self.phases.to_training()
            self.sample_writer.write(samples, step=step)
            metrics |= summarize_samples(samples)

            batch = build_batch(samples, pad_token_id=self.pad_token_id)
            batch, log_prob_metrics = self._compute_log_probs(batch)
            batch = self._compute_values(batch)
            batch, advantage_metrics = self._compute_advantages(batch, samples)
            metrics |= log_prob_metrics | advantage_metrics

            metrics |= self._update_critic(batch, step=step)
            if step > self.settings.critic_warmup:
                metrics |= self._update_actor(batch, step=step)
            self._save_if_due(step)
            metrics |= self.phases.to_rollout()
        return metrics | self._timer.take() | {"memory/peak_gib": peak_memory_gib()}

    def _roll_out(self, prompts: list[Prompt]) -> tuple[list[Sample], Metrics]:
        repeated = [prompt for prompt in prompts for _ in range(self.settings.n_samples_per_prompt)]
        with self._timer("rollout"):
            samples = self.rollout.generate(repeated, self.sampling)
        return samples, dict(self.rollout.metrics)

    def _compute_log_probs(self, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
        with self._timer("log_prob"):
            old_log_probs = self.actor.compute_log_probs(
                batch, micro_batch_size=self.actor_schedule.forward_micro_batch_size
            )
        batch = batch.with_fields(old_log_probs=old_log_probs)
        metrics = compute_parity(batch)
        if self.reference is not None:
            with self._timer("ref_log_prob"):
                ref_log_probs = self.reference.compute_log_probs(batch, micro_batch_size=self.ref_micro_batch_size)
            batch = batch.with_fields(ref_log_probs=ref_log_probs)
            kl = compute_kl(old_log_probs, ref_log_probs, kind=self.settings.kl_penalty)
            metrics["actor/ref_kl"] = float(masked_mean(kl, batch.loss_mask))
        return batch, metrics

    def _compute_values(self, batch: TrainBatch) -> TrainBatch:
        with self._timer("value"):
            values = self.critic.compute_values(batch, micro_batch_size=self.critic_schedule.forward_micro_batch_size)
        return batch.with_fields(values=values)

    def _compute_advantages(self, batch: TrainBatch, samples: list[Sample]) -> tuple[TrainBatch, Metrics]:
        with self._timer("advantage"):
            rewards, metrics = self._token_rewards(batch, samples)
            values = batch.required("values")
            advantages, returns = compute_gae(
                rewards, values, batch.loss_mask, gamma=self.settings.gamma, lam=self.settings.lam
            )
            metrics |= {
                "critic/explained_variance": float(compute_explained_variance(values, returns, batch.loss_mask)),
                "critic/return_mean": float(masked_mean(returns, batch.loss_mask)),
                "advantage/mean": float(masked_mean(advantages, batch.loss_mask)),
            }
            advantages = whiten(advantages, batch.loss_mask)
        return batch.with_fields(rewards=rewards, advantages=advantages, returns=returns), metrics

    def _token_rewards(self, batch: TrainBatch, samples: list[Sample]) -> tuple[Tensor, Metrics]:
        """Each sample's score on its last token, minus the KL penalty if configured. [B, T] float32."""
        scores = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
        rewards = compute_token_rewards(scores, batch.loss_mask)
        if not self.settings.use_kl_in_reward:
            return rewards, {}
        kl_coef = self.kl_controller.kl_coef
        rewards, current_kl = apply_kl_penalty(
            rewards,
            batch.required("old_log_probs"),
            batch.required("ref_log_probs"),
            batch.loss_mask,
            kl_coef=kl_coef,
            kind=self.settings.kl_penalty,
        )
        self.kl_controller.update(current_kl, n_steps=len(batch))
        return rewards, {"actor/reward_kl": current_kl, "actor/reward_kl_coef": kl_coef}

    def _update_critic(self, batch: TrainBatch, *, step: int) -> Metrics:
        schedule = self.critic_schedule
        with self._timer("update_critic"):
            rounds = [
                self.critic.update(part, self.value_objective.bind(part), micro_batch_size=schedule.micro_batch_size)
                for part in iterate_mini_batches(batch, schedule, step=step)
            ]
        return {f"critic/{_bare(key)}": value for key, value in average(rounds).items()}

    def _update_actor(self, batch: TrainBatch, *, step: int) -> Metrics:
        schedule = self.actor_schedule
        with self._timer("update_actor"):
            rounds = [
                self.actor.update(
                    part,
                    self.policy_objective.bind(part),
                    micro_batch_size=schedule.micro_batch_size,
                    with_entropy=self.policy_objective.needs_entropy,
                )
                for part in iterate_mini_batches(batch, schedule, step=step)
            ]
        return {f"actor/{_bare(key)}": value for key, value in average(rounds).items()}

    def _save_if_due(self, step: int) -> None:
        """Save while the trainer has the devices: roles may give their state back for the rollout."""
        if self.checkpointer is not None and self.checkpointer.is_due(step):
            with self._timer("save"):
                self.checkpointer.save(self.state(step=step))

    def _validates_at(self, step: int) -> bool:
        settings = self.settings
        return settings.test_freq > 0 and (step % settings.test_freq == 0 or step == settings.total_steps)


def iterate_mini_batches(batch: TrainBatch, schedule: UpdateSchedule, *, step: int) -> Iterator[TrainBatch]:
    """Mini-batches of every epoch, in an order that depends on the seed, the step and the epoch alone."""
    for epoch in range(schedule.epochs):
        order = torch.arange(len(batch))
        if schedule.shuffle:
            generator = torch.Generator().manual_seed(hash((schedule.seed, step, epoch)) % 2**63)
            order = torch.randperm(len(batch), generator=generator)
        for indices in order.split(schedule.mini_batch_size):
            yield batch.select(indices)


def compute_parity(batch: TrainBatch) -> Metrics:
    """How far the engine's log-probs of its own samples are from the trainer's, over trained tokens."""
    difference = (batch.required("old_log_probs") - batch.required("rollout_log_probs")).abs() * batch.loss_mask
    return {
        "parity/log_prob_abs_diff_mean": float(masked_mean(difference, batch.loss_mask)),
        "parity/log_prob_abs_diff_max": float(difference.max()),
    }


def average(rounds: list[Metrics]) -> Metrics:
    """Mean of each metric over the optimizer steps of one phase."""
    return {key: sum(metrics[key] for metrics in rounds) / len(rounds) for key in rounds[0]}


def _bare(key: str) -> str:
    return key.rsplit("/", 1)[-1]
