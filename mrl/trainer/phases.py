"""The hand-over of devices between trainer and rollout engines: who gives what back, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mrl.interfaces import Rollout, TrainEngine
from mrl.observability.timers import PhaseTimer

Metrics = dict[str, float]

ENGINE_TAGS = ("kv_cache", "weights")
"""What an engine gives back while the trainer works. CUDA graphs stay: they hold addresses, which survive."""


@dataclass(kw_only=True)
class PhaseSwitch:
    """Moves the devices from training to rollout and back. Called by all ranks.

    Nothing is taken before the other side has given back, and the KV cache, which nobody waits for, is taken last:
    the peak is the larger of the two phases, never their sum.
    """

    rollout: Rollout
    roles: Sequence[TrainEngine]
    engine_tags: Sequence[str]
    """Empty where engines keep their memory: on CPU, or with rollout.free_cache_engine=False."""
    allocated_gib: Callable[[], float]
    """Device memory in use by everybody, in GiB; 0 without a device."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    """Takes the phases `switch` and `reshard`."""

    def __post_init__(self) -> None:
        self._engines_are_resident = not self.engine_tags

    def to_rollout(self) -> Metrics:
        """Trainer memory is given back, engines take theirs and pull the actor's weights; returns `reshard/*`."""
        metrics = {"memory/train_gib": self.allocated_gib()}
        with self.timer("switch"):
            for role in self.roles:
                role.offload()
            self._resume("weights")
        with self.timer("reshard"):
            metrics |= self.rollout.update_weights()
        with self.timer("switch"):
            self._resume("kv_cache")
        self._engines_are_resident = True
        return metrics | {"memory/rollout_gib": self.allocated_gib()}

    def to_training(self) -> None:
        """Engines give their memory back and the trainer takes its own; a second call changes nothing."""
        with self.timer("switch"):
            if self.engine_tags and self._engines_are_resident:
                self.rollout.release_memory(self.engine_tags)
                self._engines_are_resident = False
            for role in self.roles:
                role.onload()

    def _resume(self, tag: str) -> None:
        if tag in self.engine_tags and not self._engines_are_resident:
            self.rollout.resume_memory([tag])
