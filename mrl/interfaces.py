"""The seams between the training loop and what it drives.

`trainer/ppo.py` sees only these. Every rank runs the same loop over the same global batch; which part of it a rank
computes, and over which processes, is the implementation's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mrl.reshard.peer_sums import PeerSums
from mrl.types import Generation, Metric, MicroBatchLimit, Prompt, Sample, SamplingParams, TrainBatch

ModelOutput = Mapping[str, Tensor]
"""Of one micro-batch, aligned with its tokens, [b, t] float32: `log_probs` (and `entropy` if asked for) or `values`."""

LossFn = Callable[[ModelOutput, TrainBatch], tuple[Tensor, dict[str, Metric]]]
"""Scalar loss of one micro-batch, already divided by the denominators of its whole mini-batch.

The sum of the results over all micro-batches of all data-parallel ranks is the mini-batch's loss.
"""


class TrainEngine(Protocol):
    """One role's model (actor, critic or reference). Called by all ranks with the same arguments."""

    def compute_log_probs(self, batch: TrainBatch, *, limit: MicroBatchLimit) -> Tensor:
        """Log-probs of `batch.tokens` at the sampling temperature. [B, T] float32, on every rank; entry 0 is 0."""
        ...

    def compute_values(self, batch: TrainBatch, *, limit: MicroBatchLimit) -> Tensor:
        """Value before each token. [B, T] float32, on every rank; entry 0 is 0."""
        ...

    def update(
        self, mini_batch: TrainBatch, loss_fn: LossFn, *, limit: MicroBatchLimit, with_entropy: bool = False
    ) -> dict[str, float]:
        """One optimizer step. Returns the reduced metrics of `loss_fn`, with `loss`, `grad_norm` and `lr` added."""
        ...

    def stage_checkpoint(self, folder: Path, *, in_background: bool) -> CheckpointWrite:
        """Parameters, optimizer, schedule and random states of now, to be written to `folder`, which is empty.

        Args:
            in_background: take a copy, because training goes on while it is written; the copy before it is given up.
        """
        ...

    def load_checkpoint(self, folder: Path, contents: Collection[str]) -> None:
        """Continue from what was written, in whatever layout that was; `contents` as load_contents names them."""
        ...

    def stage_hugging_face(self, folder: Path, *, in_background: bool) -> CheckpointWrite:
        """The parameters under their Hugging Face names, to be written to `folder`, which exists, as safetensors."""
        ...

    def release(self) -> None:
        """Free device memory that need not be copied anywhere, and leave the parameters as engines may read them."""
        ...

    def offload(self) -> None:
        """Begin to give back device memory as configured, behind all work of this role so far.

        The role stays usable: what is used comes back. What is given back is free once its copy is done.
        """
        ...

    def onload(self) -> None:
        """Begin to take back what a forward pass needs, so that it need not wait for it."""
        ...

    def close(self) -> None:
        """Release process groups and buffers."""
        ...


class CheckpointWrite(Protocol):
    """What a role wants on the disk."""

    def write(self) -> list[Path]:
        """Write this rank's files and return their paths. Calls no collective, so any thread can do it.

        Raises CheckpointError with the system's reason, on this rank only.
        """
        ...

    def finish(self) -> None:
        """Write what describes all ranks' files. Called by all ranks once all of them have written theirs.

        Raises CheckpointError on all ranks.
        """
        ...


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged or belongs to another run; the message says what to do."""


@dataclass(kw_only=True, frozen=True)
class WeightUpdateReport:
    """What one reshard into one engine did."""

    weight_version: int
    bytes: int
    ops: int
    pull_s: float
    """Slowest engine rank, copy, exchange with other hosts and verification."""
    call_s: float
    """Whole call as its caller sees it."""
    local_bytes: int = 0
    """Of `bytes`, those from the engine ranks' own devices."""
    remote_bytes: int = 0
    """Of `bytes`, those from other hosts, as counted where they arrived."""
    aliased_bytes: int = 0
    """Beside `bytes`: of parameters that are the trainer's own memory."""
    peer_sums: Sequence[PeerSums] = ()
    """Of every engine rank. Where they name ranks of other engines, the weights are whole only if theirs agree."""


def update_round(weight_version: int, redo: int) -> str:
    """Name of one update of the engines, under which those of several hosts meet."""
    return f"{weight_version}.{redo}"


TakePrompts = Callable[[int], Sequence[tuple[int, Sequence[int]]]]
"""Called with the number of free slots; returns at most that many (index, token ids), none when the queue is empty."""


class RolloutEngine(Protocol):
    """One SGLang engine, used by the rank that owns it. Every call has a deadline.

    An engine that dies, or misses a deadline, raises EngineDiedError from that call and those after it, until it is
    restarted. Giving up or taking memory is no such call: what a dead engine had is free.
    """

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One response to each prompt, in order."""
        ...

    def update_weights(self, control: Mapping[str, Any], *, weight_version: int, redo: int = 0) -> WeightUpdateReport:
        """Have every engine rank pull its weights; `control` is JSON for the weight loader.

        Samples depend on the version and on `redo`, which tells updates to the same version apart.

        Raises EngineError with every failing rank's own message; the engine stays usable.
        """
        ...

    def refuse_weights(self, reason: str) -> None:
        """Generate no more until an update succeeds: the last one, though it did, did not bring the weights whole."""
        ...

    def restart(self) -> None:
        """Replace the engine's processes, dead or alive, by new ones, which wait for weights."""
        ...

    def release_memory(self, tags: Sequence[str]) -> None: ...

    def resume_memory(self, tags: Sequence[str]) -> None: ...

    def shutdown(self) -> None:
        """Stop all engine processes; idempotent."""
        ...


class EngineError(RuntimeError):
    """A rollout engine failed to start, died or refused a call; the message carries the child's own error."""


class EngineDiedError(EngineError):
    """An engine's processes ended or no longer answer; `restart` brings it back, without weights."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.finished: dict[int, Generation] = {}
        """Responses that were complete by then, by the index of their prompt."""


class Rollout(Protocol):
    """All rollout engines of the job. Called by all ranks with the same arguments."""

    metrics: dict[str, float]
    """`rollout/*` of the last `generate`."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the engines have."""
        ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """One sample for each prompt, in order, on every rank."""
        ...

    def update_weights(self) -> dict[str, float]:
        """Reshard the actor's current weights into every engine; returns `reshard/*` metrics."""
        ...

    def release_memory(self, tags: Sequence[str]) -> None:
        """Have every engine give up its memory of `tags`: "weights", "kv_cache", "cuda_graph"."""
        ...

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Have every engine take that memory again; weights need an update afterwards."""
        ...

    def close(self) -> None: ...


class RewardFn(Protocol):
    """Scores samples. Knows nothing of ranks; runs concurrently with other calls."""

    def __call__(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        """Reward and named parts of each sample. A failing verifier raises RewardError naming the sample."""
        ...

    def close(self) -> None:
        """Stop what it started."""
        ...


class RewardError(RuntimeError):
    """A reward function raised or returned something that is not a finite number."""


class EnvironmentFailedError(RuntimeError):
    """What answers the model failed where that ends the run; the message has the first failure."""


USER_ERRORS = (ValueError, EngineError, RewardError, EnvironmentFailedError)
"""Errors whose message alone tells a user what to do; the same run would fail again."""
