"""The hand-over of devices between trainer and rollout engines: who gives what back, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mrl.interfaces import Rollout, TrainEngine
from mrl.observability.timers import PhaseTimer
from mrl.parallel.agreement import gather_results

Metrics = dict[str, float]

ENGINE_TAGS = ("kv_cache", "weights")
"""What an engine gives back while the trainer works. CUDA graphs stay: they hold addresses, which survive."""

_MARGIN_BYTES = 2**29
"""Left free where an engine takes memory while roles still hold some: its allocations are rounded up."""


class DeviceMemory(Protocol):
    """The memory of this rank's device. All sizes are in bytes."""

    def in_use(self) -> int:
        """In use by any process."""
        ...

    def free(self) -> int:
        """That any process may take."""
        ...

    def reclaim(self) -> None:
        """Wait for this process's work and copies, and give back what it holds unused."""
        ...

    def metrics(self, moment: str) -> Metrics:
        """Who holds how much, under the name of the moment."""
        ...

    def residue_metrics(self) -> Metrics:
        """What tensors here do not explain while the engine has given back what it can."""
        ...


@dataclass(kw_only=True)
class PhaseSwitch:
    """Moves the devices from training to rollout and back. Called by all ranks.

    Nothing is taken before there is room for it, and the KV cache, which nobody waits for, is taken last: the peak is
    the larger of the two phases, never their sum.
    """

    rollout: Rollout
    roles: Sequence[TrainEngine]
    """In the order in which a step uses them."""
    engine_tags: Sequence[str]
    """Empty where engines keep their memory: on CPU, or with rollout.free_cache_engine=False."""
    device: DeviceMemory | None = None
    """None where there is no device."""
    holds_engine: bool = True
    """Whether an engine has memory on this rank's device."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    """Takes the phases `switch` and `reshard`."""

    def __post_init__(self) -> None:
        self._engines_are_resident = not self.engine_tags
        self._sizes: dict[str, int] = {} if self.holds_engine else dict.fromkeys(self.engine_tags, 0)
        """The most that an engine took for a tag on this rank's device when it resumed it, in bytes."""
        self._metrics: Metrics = {}

    def to_rollout(self) -> Metrics:
        """Trainer memory is given back, engines take theirs and pull the actor's weights.

        Where the engine's weights fit beside the roles' state, they come while it is still on its way to the host.

        Returns:
            `reshard/*`, and `memory/*` at every step of this switch and of the one before it, to training.
        """
        self._note("train")
        with self.timer("switch"):
            for role in self.roles:
                role.release()
            self._reclaim("released")
            for role in self.roles:
                role.offload()
            if not self._fits("weights"):
                self._reclaim("offloaded")
            self._resume("weights")
        self._note("weights")
        with self.timer("reshard"):
            self._metrics |= self.rollout.update_weights()
        with self.timer("switch"):
            self._reclaim("offloaded")
            self._resume("kv_cache")
        self._engines_are_resident = True
        self._note("rollout")
        metrics, self._metrics = self._metrics, {}
        return metrics

    def to_training(self) -> None:
        """Engines give their memory back and the trainer begins to take its own; a second call changes nothing."""
        if not self._engines_are_resident or not self.engine_tags:
            self._onload()
            return
        self._note("generated")
        with self.timer("switch"):
            self.rollout.release_memory(self.engine_tags)
        self._engines_are_resident = False
        if self.device is not None:
            self._metrics |= self.device.residue_metrics()
        self._note("engines_released")
        self._onload()

    def _onload(self) -> None:
        with self.timer("switch"):
            for role in self.roles:
                role.onload()

    def _fits(self, tag: str) -> bool:
        """Whether every rank's device has room for what its engine takes; not known before it has done so once."""
        if tag not in self.engine_tags or self._engines_are_resident or self.device is None:
            return True
        size, device = self._sizes.get(tag), self.device
        return all(gather_results(lambda: size is not None and device.free() >= size + _MARGIN_BYTES))

    def _reclaim(self, moment: str) -> None:
        if self.device is not None:
            self.device.reclaim()
            self._note(moment)

    def _resume(self, tag: str) -> None:
        if tag not in self.engine_tags or self._engines_are_resident:
            return
        # An engine takes memory of several ranks' devices: all of them have to have given back.
        gather_results(lambda: None)
        before = self.device.in_use() if self.device else 0
        self.rollout.resume_memory([tag])
        taken = self.device.in_use() - before if self.device else 0
        # An engine that is dead takes nothing now, and all of it when it is restarted.
        if taken > 0:
            self._sizes[tag] = max(taken, self._sizes.get(tag, 0))

    def _note(self, moment: str) -> None:
        if self.device is not None:
            self._metrics |= self.device.metrics(moment)
