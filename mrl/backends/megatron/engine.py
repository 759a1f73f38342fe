"""`TrainEngine` over megatron-core: one role's model, its passes and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mrl.backends.host_copies import Copier
from mrl.backends.megatron.buffers import ExportedWeights
from mrl.backends.megatron.checkpoint import load_role, stage_role
from mrl.backends.megatron.checkpoint_write import HostBuffer, StagedCheckpoint
from mrl.backends.megatron.groups import destroy_groups
from mrl.backends.megatron.hf_export import StagedExport, stage_hf_weights
from mrl.backends.megatron.inputs import ContextPlace, packed_inputs, padded_inputs
from mrl.backends.megatron.metrics import ReducedMetrics, merge_ranks, reduce_micro_batches
from mrl.backends.megatron.model import ModelChunk
from mrl.backends.megatron.offload import OffloadSettings, RoleOffload
from mrl.backends.megatron.outputs import log_prob_output, value_output
from mrl.backends.megatron.role_state import RoleState
from mrl.backends.megatron.router_replay import RouterReplay
from mrl.backends.megatron.schedule import MicroBatch, Schedule
from mrl.interfaces import LossFn
from mrl.launch.addresses import LOOPBACK
from mrl.parallel.agreement import gather_results
from mrl.parallel.balancing import attention_crossover
from mrl.parallel.layout import ParallelLayout
from mrl.parallel.microbatches import PlanRules, plan_micro_batches
from mrl.reshard.layout import SourceRank
from mrl.reshard.spec import ModelSpec
from mrl.types import Metric, MicroBatchLimit, TrainBatch

_REPLAY = "router_replay_changed_fraction"
_RESERVED = ("loss", "grad_norm", "lr", _REPLAY)


@dataclass(kw_only=True, frozen=True)
class TrainingParts:
    """What a trained role has beyond a model."""

    modules: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler


@dataclass(kw_only=True, frozen=True)
class EngineParts:
    """What `build_engine` puts together."""

    state: RoleState
    groups: ProcessGroupCollection
    layout: ParallelLayout
    chunks: list[ModelChunk]
    schedule: Schedule
    replay: RouterReplay | None
    """Of the experts that the engine has chosen; None where the model's routers choose."""
    training: TrainingParts | None
    spec: ModelSpec
    temperature: float
    has_value_head: bool
    packed: bool
    """Samples of a micro-batch run end to end instead of padded to the longest."""
    device: torch.device
    offload: OffloadSettings
    copier: Copier | None
    """None where nothing can be offloaded."""


class MegatronEngine:
    """One role. Every method is called by all ranks of the job with the same arguments.

    The batch is dealt out over the data-parallel ranks by token count; results cover the whole batch, in its order.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._offload = _role_offload(parts)
        self._host_buffer = HostBuffer()
        self._place = ContextPlace(rank=parts.groups.cp.rank(), size=parts.groups.cp.size())
        self._export = ExportedWeights(parts.chunks, parts.groups)

    @property
    def layout(self) -> ParallelLayout:
        """How the ranks of the job factor for this role."""
        return self._parts.layout

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under Megatron's names with the layer's global number."""
        return chain.from_iterable(chunk.named_parameters() for chunk in self._parts.chunks)

    def compute_log_probs(self, batch: TrainBatch, *, limit: MicroBatchLimit) -> Tensor:
        """Log-probs of `batch.tokens` at the sampling temperature. [B, T] float32 on the CPU, on every rank.

        Entry 0 and entries past a sample's length are 0.
        """
        assert not self._parts.has_value_head, "a model with a value head has no log-probs"
        return self._forward(batch, "log_probs", limit)

    def compute_values(self, batch: TrainBatch, *, limit: MicroBatchLimit) -> Tensor:
        """Value before each token. [B, T] float32 on the CPU, on every rank; zeros as in `compute_log_probs`."""
        assert self._parts.has_value_head, "only a model with a value head has values"
        return self._forward(batch, "values", limit)

    def update(
        self, mini_batch: TrainBatch, loss_fn: LossFn, *, limit: MicroBatchLimit, with_entropy: bool = False
    ) -> dict[str, float]:
        """One optimizer step; returns the reduced metrics, with `loss`, `grad_norm` and the `lr` it was made with.

        With router replay also `router_replay_changed_fraction`: of the engine's choices of experts, those that the
        model would have made otherwise.

        Raises:
            FloatingPointError: a gradient or the gradient norm is not finite; the step was not made in the first
                case. Raised on all ranks.
            Exception: whatever `loss_fn` raised on some rank, on all ranks; no step was made.
        """
        training = self._training()
        micro_batches = self._micro_batches(mini_batch, limit)
        guarded = _GuardedLoss(loss_fn, partial(self._outputs, with_entropy=with_entropy))
        with self._parts.state:
            self._offload.begin_update()
            _zero_gradients(training)
            contributions = self._parts.schedule.forward_backward(micro_batches, guarded)
            reports = gather_results(lambda: (self._report(guarded, contributions), self._count_changed()))
            metrics = merge_ranks(report for report, _ in reports)
            if self._parts.replay is not None:
                metrics[_REPLAY] = sum(changed for _, (changed, _) in reports) / sum(made for _, (_, made) in reports)
            lr = float(training.optimizer.param_groups[0]["lr"])
            self._offload.need_optimizer()
            grad_norm = _step(training)
        return {**metrics, "grad_norm": grad_norm, "lr": lr}

    def export_weights(self, host: str = LOOPBACK) -> SourceRank:
        """Where this rank's current parameters lie; they keep their addresses for the life of the engine.

        Args:
            host: address under which the job's other hosts reach this one.
        """
        with self._parts.state:
            self._gather_parameters()
        return self._export.source(host)

    def stage_checkpoint(self, folder: Path, *, in_background: bool) -> StagedCheckpoint:
        """Parameters, optimizer, schedule and random states of now, to be written to `folder`.

        Where it is written in the background, they are copied to host memory that the next call uses again.
        """
        with self._parts.state:
            self._offload.release_gradients()
            self._offload.need_optimizer()
            self._gather_parameters()
            return stage_role(self._parts, folder, self._host_buffer if in_background else None)

    def load_checkpoint(self, folder: Path, contents: Collection[str] = ("model", "optimizer", "extra")) -> None:
        """Continue from what was staged and written, in whatever layout that was; parameters keep their addresses."""
        with self._parts.state:
            self._offload.begin_update()
            self._offload.need_optimizer()
            load_role(self._parts, folder, contents)

    def stage_hugging_face(self, folder: Path, *, in_background: bool) -> StagedExport:
        """The parameters under their Hugging Face names, to be written to `folder` as safetensors files.

        Those that are not written in the background are in their files already.
        """
        assert not self._parts.has_value_head, "a value head has no place in a Hugging Face causal model"
        with self._parts.state:
            self._gather_parameters()
            return stage_hf_weights(self._parts, folder, in_background=in_background)

    def release(self) -> None:
        """Free device memory whose contents need not be kept, and leave the parameters as engines may read them."""
        if not self._offload.parameters_are_away:
            with self._parts.state:
                self._gather_parameters()
        self._offload.release()

    def offload(self) -> None:
        """Begin to give back device memory as the role's settings say, behind its work there; what is used returns."""
        self.release()
        self._offload.offload()

    def onload(self) -> None:
        """Begin to bring back what a forward pass needs."""
        self._offload.onload()

    def close(self) -> None:
        """Destroy the role's process groups and drop its model and buffers; the engine is unusable afterwards."""
        if not hasattr(self, "_parts"):
            return
        with self._parts.state:
            destroy_groups()
        del self._parts, self._export, self._offload

    def _training(self) -> TrainingParts:
        assert self._parts.training is not None, "this role was built without an optimizer"
        return self._parts.training

    def _forward(self, batch: TrainBatch, key: str, limit: MicroBatchLimit) -> Tensor:
        parts = self._parts
        micro_batches = self._micro_batches(batch, limit)
        with parts.state:
            self._gather_parameters()
            outputs = parts.schedule.forward(micro_batches, lambda output, item: self._outputs(output, item)[key])
        result = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=parts.device)
        for item, output in zip(micro_batches, outputs, strict=False):
            if not item.is_filler:
                width = min(output.shape[1], result.shape[1])
                result[item.indices, :width] = output[:, :width]
        # Each entry is set on one data-parallel rank, on its last stage, and 0 elsewhere: sums are exact.
        dist.all_reduce(result, group=parts.groups.pp)
        dist.all_reduce(result, group=parts.groups.dp)
        return result.cpu()

    def _outputs(self, output: Tensor, item: MicroBatch, *, with_entropy: bool = False) -> dict[str, Tensor]:
        parts = self._parts
        if parts.has_value_head:
            return value_output(output, item.inputs, cp_group=parts.groups.cp)
        return log_prob_output(
            output,
            item.inputs,
            tp_group=parts.groups.tp,
            cp_group=parts.groups.cp,
            vocab_size=parts.spec.vocab_size,
            temperature=parts.temperature,
            with_entropy=with_entropy,
        )

    def _micro_batches(self, batch: TrainBatch, limit: MicroBatchLimit) -> list[MicroBatch]:
        """This data-parallel rank's share, on the device."""
        parts = self._parts
        if parts.replay is not None and batch.routed_experts is None:
            raise ValueError("this role replays the engine's choice of experts, and the batch has no routed_experts")
        lengths = batch.lengths.tolist()
        rules = PlanRules(
            dp_size=parts.groups.dp.size(),
            count_multiple=parts.schedule.count_multiple,
            packed=parts.packed,
            crossover=_attention_crossover(parts.spec),
        )
        share = plan_micro_batches(lengths, limit=limit, rules=rules, dp_rank=parts.groups.dp.rank())
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        return [self._micro_batch(batch, indices, shortest) for indices in share]

    def _micro_batch(self, batch: TrainBatch, indices: list[int], stand_in: int) -> MicroBatch:
        packed, multiple = self._parts.packed, self._parts.schedule.width_multiple
        chosen = indices or [stand_in]
        selected = (
            batch.select(chosen)
            .trim(1 if packed else multiple)
            .map_tensors(lambda tensor: tensor.to(self._parts.device))
        )
        inputs = packed_inputs(selected, multiple=multiple, place=self._place) if packed else padded_inputs(selected)
        return MicroBatch(batch=selected, inputs=inputs, indices=chosen, is_filler=not indices)

    def _report(self, guarded: _GuardedLoss, contributions: Sequence[dict[str, Metric]]) -> ReducedMetrics:
        """This rank's metrics if it is the one that speaks for its data-parallel rank, after checking its gradients."""
        if guarded.error is not None:
            raise guarded.error
        metrics = reduce_micro_batches(contributions)
        for module in self._training().modules:
            for buffer in chain(module.buffers, module.expert_parallel_buffers):
                # The largest magnitude is NaN if any element is.
                if not torch.linalg.vector_norm(buffer.grad_data, ord=torch.inf).isfinite():
                    loss = f", its micro-batches' loss is {metrics['loss'][0]}" if metrics else ""
                    raise FloatingPointError(
                        f"rank {dist.get_rank()} has gradients that are not finite{loss}; no optimizer step was made"
                    )
        return metrics if self._parts.groups.tp.rank() == self._parts.groups.cp.rank() == 0 else {}

    def _count_changed(self) -> tuple[int, int]:
        return self._parts.replay.count_changed() if self._parts.replay else (0, 0)

    def _gather_parameters(self) -> None:
        """With overlap_param_gather parameters are stale after a step until the next forward pass asks for them."""
        self._offload.need_parameters()
        if self._parts.training is None:
            return
        for module in self._parts.training.modules:
            if module.ddp_config.overlap_param_gather:
                with torch.no_grad():
                    module.start_param_sync(force_sync=True)


def _attention_crossover(spec: ModelSpec) -> int:
    query_size, kv_size = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    width = 2 * query_size + 2 * kv_size + 3 * spec.intermediate_size
    return attention_crossover(parameters_per_layer=spec.hidden_size * width, attention_size=query_size)


def _role_offload(parts: EngineParts) -> RoleOffload:
    return RoleOffload(
        parts.offload,
        parts.copier,
        parameters=[parameter for chunk in parts.chunks for _, parameter in chunk.named_parameters()],
        modules=parts.training.modules if parts.training else [],
        optimizer=parts.training.optimizer if parts.training else None,
    )


class _GuardedLoss:
    """Calls a `LossFn`, but keeps its error: a rank that raised alone would leave the others in a collective."""

    def __init__(self, loss_fn: LossFn, outputs: Any) -> None:
        self._loss_fn = loss_fn
        self._outputs = outputs
        self.error: Exception | None = None

    def __call__(self, output: Tensor, item: MicroBatch) -> tuple[Tensor, dict[str, Metric]]:
        """Loss and metrics of one micro-batch; a filler's loss is 0 and it has no metrics."""
        outputs = self._outputs(output, item)
        nothing = torch.stack([part.sum() for part in outputs.values()]).sum() * 0.0
        if item.is_filler or self.error is not None:
            return nothing, {}
        try:
            loss, metrics = self._loss_fn(outputs, item.batch)
            taken = [name for name in _RESERVED if name in metrics]
            if taken:
                raise ValueError(f"the loss function returned the metrics {taken}, which the engine adds itself")
        except Exception as error:
            self.error = error
            return nothing, {}
        # The schedule may change the loss in place.
        return loss, {"loss": Metric(loss.detach().clone()), **metrics}


def _zero_gradients(training: TrainingParts) -> None:
    for module in training.modules:
        module.zero_grad_buffer()
    training.optimizer.zero_grad()


def _step(training: TrainingParts) -> float:
    """Make the optimizer step and advance the learning rate; returns the gradient norm before clipping."""
    made, norm, _ = training.optimizer.step()
    grad_norm = float(training.optimizer.get_grad_norm() if norm is None else norm)
    if not made or not math.isfinite(grad_norm):
        raise FloatingPointError(f"the optimizer step failed: gradient norm {grad_norm}, step made: {made}")
    training.scheduler.step(1)
    return grad_norm
