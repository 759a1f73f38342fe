"""Running micro-batches through megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mrl.backends.megatron.inputs import ModelInputs
from mrl.backends.megatron.router_replay import RouterReplay
from mrl.parallel.layout import ParallelLayout
from mrl.types import TrainBatch


@dataclass(kw_only=True, frozen=True)
class MicroBatch:
    """Samples that run together, on the device."""

    batch: TrainBatch
    """Trimmed to the longest of them."""
    inputs: ModelInputs
    """The same for the model, padded or packed."""
    indices: list[int]
    """Of the samples, in the whole batch."""
    is_filler: bool = False
    """Runs only because every rank must run equally many; its results count nowhere."""


OutputFn = Callable[[Tensor, MicroBatch], Any]
"""Model output on the last stage, [b, t, ...] or packed [1, N, ...] -> this micro-batch's result."""

LossStep = Callable[[Tensor, MicroBatch], tuple[Tensor, Any]]
"""Model output on the last stage, the same -> scalar loss and this micro-batch's result."""


class Schedule:
    """The schedule of one role: 1F1B, interleaved, or none without pipeline parallelism."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        layout: ParallelLayout,
        replay: RouterReplay | None = None,
    ) -> None:
        check_pipeline_config(config)
        self._replay = replay
        self._modules = list(modules)
        self._layout = layout
        self._groups = groups
        # Megatron's bfloat16 wrapper would make a float32 copy of all logits, and another of their gradient.
        self._module_options = {"fp32_output": False} if config.bf16 else {}
        self._communicator = P2PCommunicator(groups.pp, config)
        self._run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vpp)

    @property
    def count_multiple(self) -> int:
        """The number of micro-batches must be a multiple of this."""
        return self._layout.pp if self._layout.vpp else 1

    @property
    def width_multiple(self) -> int:
        """The width of every micro-batch's tokens must be a multiple of this."""
        return self._layout.tp if self._layout.sequence_parallel else 1

    def forward(self, micro_batches: Sequence[MicroBatch], output_fn: OutputFn) -> list[Any]:
        """Results of `output_fn` in order, without gradients. Called by all ranks; empty but on the last stage."""

        def read(output: Tensor, item: MicroBatch, non_loss_data: bool = True) -> Any:
            return output_fn(output, item)

        with torch.no_grad():
            return self._execute(micro_batches, read, forward_only=True, collect_non_loss_data=True)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_step: LossStep) -> list[Any]:
        """Accumulate and reduce the gradients of the sum of losses. Results as in `forward`. Called by all ranks.

        The schedule divides losses in place unless each comes with a token count; the count itself is ignored.
        """

        def step(output: Tensor, item: MicroBatch) -> tuple[Tensor, Tensor, Any]:
            loss, result = loss_step(output, item)
            return loss, torch.ones((), dtype=torch.int, device=loss.device), result

        return self._execute(micro_batches, step, forward_only=False)

    def _execute(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool, **options: Any
    ) -> list[Any]:
        self._check(micro_batches)

        def forward_step(iterator: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            item = next(iterator)
            inputs = item.inputs
            packed = {} if inputs.packed is None else {"packed_seq_params": inputs.packed}
            with self._replaying(item, module):
                output = module(inputs.tokens, inputs.positions, None, **packed, **self._module_options)
            return output, partial(last_stage, item=item)

        first = micro_batches[0].inputs.tokens
        with self._replay.running(with_backward=not forward_only) if self._replay else nullcontext():
            return self._run(
                forward_step_func=forward_step,
                data_iterator=[iter(micro_batches) for _ in self._modules],
                model=self._modules,
                num_microbatches=len(micro_batches),
                # Without pipeline parallelism unused; with it, shapes are exchanged for each micro-batch.
                micro_batch_size=first.shape[0],
                seq_length=first.shape[1],
                p2p_communicator=self._communicator,
                pg_collection=self._groups,
                forward_only=forward_only,
                **options,
            )

    def _replaying(self, item: MicroBatch, module: torch.nn.Module) -> AbstractContextManager[None]:
        if self._replay is None:
            return nullcontext()
        assert item.batch.routed_experts is not None, "nothing to replay"
        return self._replay.forward_step(item.inputs, item.batch.routed_experts, self._modules.index(module))

    def _check(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Megatron would compute wrong numbers or stop in the middle of a collective."""
        count = len(micro_batches)
        if count == 0 or count % self.count_multiple:
            raise ValueError(
                f"the interleaved schedule needs a multiple of pipeline_model_parallel_size = {self._layout.pp} "
                f"micro-batches, not {count}"
            )
        for item in micro_batches:
            width = item.inputs.tokens.shape[1]
            if width % self.width_multiple:
                raise ValueError(
                    f"sequence parallelism needs micro-batches as wide as a multiple of tensor_model_parallel_size = "
                    f"{self._layout.tp} tokens, not {width}"
                )


def check_pipeline_config(config: TransformerConfig) -> None:
    """Raise ValueError for settings under which megatron's interleaved schedule silently computes wrong numbers."""
    if config.virtual_pipeline_model_parallel_size is None:
        return
    if not config.overlap_p2p_comm or config.batch_p2p_comm:
        raise ValueError(
            f"virtual pipeline stages with overlap_p2p_comm = {config.overlap_p2p_comm} and batch_p2p_comm = "
            f"{config.batch_p2p_comm} exchange activations in the wrong order between two stages; set them to True "
            "and False"
        )
