"""A trainer's exported weights without a trainer: distinct values, cut by the slow reference, in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.layout import SourceRank
from mrl.reshard.reference import StateDict, megatron_shard
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transport import export_source

_ALIGNMENT_BYTES = 256


@dataclass(kw_only=True, frozen=True)
class SyntheticTrainer:
    """Every trainer rank's export, and the memory behind it, which must outlive the pulls."""

    sources: list[SourceRank]
    memory: list[dict[str, Tensor]]
    """Parameters by name, per rank."""


def distinct_state(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """A whole Hugging Face state dict in which an element in the wrong place shows.

    In 4-byte types the bit patterns count the model's elements; in 2-byte types they are random 16 bits of a fixed
    seed, so one misplaced element is missed with probability 2^-16 and a misplaced row practically never.
    """
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    start = 0
    for name, shape in tensor_shapes(spec).items():
        tensor = torch.empty(shape, dtype=dtype)
        if dtype.itemsize == 2:
            tensor.view(torch.int16).random_(-(2**15), 2**15, generator=generator)
        else:
            words = tensor.view(-1).view(torch.int32)
            torch.arange(start, start + words.numel(), out=words)
        start += tensor.numel()
        state[name] = tensor
    return state


def export_layout(
    spec: ModelSpec, state: StateDict, layout: ParallelLayout, *, padded_vocab_size: int, host: str, first_device: int
) -> SyntheticTrainer:
    """Cut `state` over all ranks of a training layout, each rank's parameters in one exported flat buffer.

    Args:
        first_device: device index of rank 0, counted up by rank; -1 puts every rank on the CPU.
    """
    sources, memory = [], []
    for rank in range(layout.world_size):
        params = in_one_buffer(trainer_shard(spec, state, layout, rank, padded_vocab_size=padded_vocab_size))
        device = first_device + rank if first_device >= 0 else -1
        sources.append(
            export_source(
                params.items(),
                rank=rank,
                tp_rank=layout.coordinates(rank)[0],
                tp_size=layout.tp,
                etp_rank=layout.etp_rank(rank),
                etp_size=layout.etp,
                host=host,
                device=device,
            )
        )
        memory.append(params)
    return SyntheticTrainer(sources=sources, memory=memory)


def trainer_shard(
    spec: ModelSpec, state: StateDict, layout: ParallelLayout, rank: int, *, padded_vocab_size: int
) -> dict[str, Tensor]:
    """Parameters of one rank of a training layout; of a state on the meta device, their names and shapes."""
    tp_rank, _, _, pp_rank = layout.coordinates(rank)
    stages = range(layout.vpp or 1)
    return megatron_shard(
        state,
        spec,
        tp_rank=tp_rank,
        tp_size=layout.tp,
        layers=[layer for stage in stages for layer in layout.layers_of(spec.num_hidden_layers, pp_rank, stage)],
        pre_process=pp_rank == 0,
        post_process=pp_rank == layout.pp - 1,
        padded_vocab_size=padded_vocab_size,
        experts=layout.experts_of(spec.moe.num_experts, layout.ep_rank(rank)) if spec.moe else (),
        etp_rank=layout.etp_rank(rank),
        etp_size=layout.etp,
    )


def in_one_buffer(shard: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """The tensors as views of one flat buffer, each start aligned, as Megatron's parameter buffer lays them.

    Tensors on the meta device have no values: their views are zero.
    """
    offsets, end = [], 0
    for tensor in shard.values():
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    buffer = torch.zeros(end, dtype=torch.uint8, device=device)
    views = {}
    for (name, tensor), offset in zip(shard.items(), offsets, strict=True):
        views[name] = buffer.narrow(0, offset, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        if not tensor.is_meta:
            views[name].copy_(tensor)
    return views
