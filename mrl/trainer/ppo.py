"""The PPO loop. It reads as the algorithm does; engines, ranks and devices are behind `mrl.interfaces`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.interfaces import TrainEngine
from mrl.observability.memory import peak_memory_gib
from mrl.observability.trackers import TrackerList
from mrl.rollout.batch import build_batch
from mrl.trainer.advantages import AdvantageStage
from mrl.trainer.checkpoint import Checkpointer, LoopState
from mrl.trainer.collection import SampleCollector, zero_variance_fraction
from mrl.trainer.correction import CorrectionStage
from mrl.trainer.phases import PhaseSwitch
from mrl.trainer.reward_model import RewardModelStage
from mrl.trainer.samples import SampleWriter, summarize_samples
from mrl.trainer.updates import UpdateSchedule, update_role
from mrl.trainer.validation import Validator
from mrl.types import MicroBatchLimit, Sample, TrainBatch

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(kw_only=True, frozen=True)
class LoopSettings:
    """When the loop does what."""

    critic_warmup: int
    total_steps: int
    test_freq: int
    val_before_train: bool
    val_only: bool


@dataclass(kw_only=True, frozen=True)
class ActorRole:
    """The actor and how it is updated."""

    engine: TrainEngine
    objective: PolicyObjective
    schedule: UpdateSchedule


@dataclass(kw_only=True, frozen=True)
class CriticRole:
    """The value function and how it is updated."""

    engine: TrainEngine
    objective: ValueObjective
    schedule: UpdateSchedule


@dataclass(kw_only=True, frozen=True)
class ReferenceRole:
    """The frozen policy."""

    engine: TrainEngine
    limit: MicroBatchLimit


@dataclass(kw_only=True)
class PPOTrainer:
    """One training run over engines that are already built."""

    settings: LoopSettings
    collector: SampleCollector
    phases: PhaseSwitch
    actor: ActorRole
    critic: CriticRole | None
    """None where advantages need no values."""
    reference: ReferenceRole | None
    """None where no KL term is active."""
    correction: CorrectionStage
    reward_model: RewardModelStage | None
    """None where functions and judges alone score."""
    advantages: AdvantageStage
    pad_token_id: int
    validator: Validator
    sample_writer: SampleWriter
    trackers: TrackerList
    checkpointer: Checkpointer | None = None
    compare_speed: Callable[[], Metrics] = dict
    """Metrics of how the ranks' speed compares, taken once a step."""
    profile: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Entered with the number of every step, for as long as it lasts."""

    def __post_init__(self) -> None:
        self._timer = self.phases.timer
        self._completed_steps = 0

    def fit(self) -> Metrics:
        """Run every step that is left; returns the metrics of the last one. Called by all ranks."""
        settings, completed = self.settings, self._completed_steps
        reshard = self.phases.to_rollout()
        if settings.val_only or (settings.val_before_train and completed == 0):
            self.trackers.log({**self._validate(completed), **reshard}, step=completed)
        elif completed and self._validates_at(completed):
            # The engine's random numbers and cached prefixes after it are what the next rollout began with.
            self._validate(completed)
        if settings.val_only:
            return reshard
        metrics: Metrics = {}
        for step in range(completed + 1, settings.total_steps + 1):
            with self.profile(step):
                metrics = self.step(step)
            if self._validates_at(step):
                metrics |= self._validate(step)
            self.trackers.log(metrics, step=step)
        if self.checkpointer is not None:
            with self._timer.watched("save"):
                self.checkpointer.finish()
        return metrics

    def state(self, *, step: int) -> LoopState:
        """What the loop has to remember once the updates of `step` are made and before engines pull their result."""
        controller = self.advantages.kl_controller
        return LoopState(
            step=step,
            weight_version=self.collector.rollout.weight_version + 1,
            prompts=self.collector.prompts.state_dict(),
            kl_controller=controller.state_dict() if controller else {},
        )

    def resume(self, state: LoopState) -> None:
        """Go on after `state.step`; roles and rollout have been put into their state of then.

        Raises:
            ValueError: the state belongs to other prompts or another order of them.
        """
        self.collector.prompts.load_state_dict(state.prompts)
        if self.advantages.kl_controller is not None:
            self.advantages.kl_controller.load_state_dict(state.kl_controller)
        self._completed_steps = state.step

    def step(self, step: int) -> Metrics:
        """One PPO step: rollout, rewards, log-probs, values, advantages, updates, reshard."""
        with self._timer("step"):
            samples, metrics = self.collector.collect(self._timer)
            self.phases.to_training()
            samples, score_metrics = self._add_model_scores(samples)
            self.sample_writer.write(samples, step=step)
            metrics |= summarize_samples(samples) | score_metrics

            batch = build_batch(samples, pad_token_id=self.pad_token_id)
            batch = self._compute_log_probs(batch)
            batch = self._compute_values(batch)
            batch, correction_metrics = self.correction.compute(batch)
            with self._timer("advantage"):
                batch, advantage_metrics = self.advantages.compute(batch, samples)
            metrics |= correction_metrics | advantage_metrics

            metrics |= self._update_critic(batch, step=step)
            if step > self.settings.critic_warmup:
                metrics |= self._update_actor(batch, step=step)
            self._save_if_due(step)
            metrics |= self.compare_speed()
            metrics |= self.phases.to_rollout()
        return metrics | self._timer.take() | {"memory/peak_gib": peak_memory_gib()}

    def _add_model_scores(self, samples: list[Sample]) -> tuple[list[Sample], Metrics]:
        if self.reward_model is None:
            return samples, {}
        with self._timer("reward_model"):
            samples = self.reward_model.score(samples)
        n = self.collector.n_samples_per_prompt
        if n == 1:
            return samples, {}
        # What was counted when the samples were collected did not know of the model's scores.
        groups = [samples[first : first + n] for first in range(0, len(samples), n)]
        return samples, {"rollout/zero_variance_fraction": zero_variance_fraction(groups)}

    def _compute_log_probs(self, batch: TrainBatch) -> TrainBatch:
        batch = batch.with_fields(old_log_probs=self._old_log_probs(batch))
        if self.reference is None:
            return batch
        with self._timer("ref_log_prob"):
            ref_log_probs = self.reference.engine.compute_log_probs(batch, limit=self.reference.limit)
            self.reference.engine.offload()
        return batch.with_fields(ref_log_probs=ref_log_probs)

    def _old_log_probs(self, batch: TrainBatch) -> Tensor:
        if self.correction.bypass_mode:
            return batch.required("rollout_log_probs")
        with self._timer("log_prob"):
            return self.actor.engine.compute_log_probs(batch, limit=self.actor.schedule.forward_limit)

    def _compute_values(self, batch: TrainBatch) -> TrainBatch:
        if self.critic is None:
            return batch
        with self._timer("value"):
            values = self.critic.engine.compute_values(batch, limit=self.critic.schedule.forward_limit)
        return batch.with_fields(values=values)

    def _update_critic(self, batch: TrainBatch, *, step: int) -> Metrics:
        if self.critic is None:
            return {}
        critic = self.critic
        with self._timer("update_critic"):
            metrics = update_role(critic.engine, critic.objective, batch, critic.schedule, step=step)
            # The actor takes its turn: its optimizer may need the memory.
            critic.engine.offload()
        return {f"critic/{key}": value for key, value in metrics.items()}

    def _update_actor(self, batch: TrainBatch, *, step: int) -> Metrics:
        actor = self.actor
        with self._timer("update_actor"):
            metrics = update_role(actor.engine, actor.objective, batch, actor.schedule, step=step)
        return {f"actor/{key}": value for key, value in metrics.items()}

    def _save_if_due(self, step: int) -> None:
        """Save while the trainer has the devices: roles may give their state back for the rollout."""
        if self.checkpointer is None:
            return
        with self._timer.watched("save"):
            self.checkpointer.publish_if_written()
        if self.checkpointer.is_due(step):
            with self._timer("save"):
                self.checkpointer.save(self.state(step=step))

    def _validate(self, step: int) -> Metrics:
        with self._timer.watched("validation"):
            return self.validator.run(step=step)

    def _validates_at(self, step: int) -> bool:
        settings = self.settings
        return settings.test_freq > 0 and (step % settings.test_freq == 0 or step == settings.total_steps)
