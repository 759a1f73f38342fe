"""What the ranks of a job would export and hold, from the model's shape: sizes only, no memory behind them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import expected_sglang_shape, layer_params, padded_vocab_size, tensor_shapes
from mrl.reshard.families.decoder import EMBEDDING, FINAL_NORM, LM_HEAD
from mrl.reshard.layout import SourceBuffer, SourceParam, SourceRank, TargetParam
from mrl.reshard.spec import ModelSpec
from mrl.reshard.synthetic import trainer_shard

_ALIGNMENT_BYTES = 256

ShardKey = tuple[int, int, int, int]
"""(tp_rank, pp_rank, ep_rank, etp_rank): trainer ranks of one key hold the same parameters."""


def host_name(rank: int, gpus_per_host: int) -> str:
    """Of the host of a trainer or engine rank."""
    return f"host-{rank // gpus_per_host}"


def shard_key(layout: ParallelLayout, rank: int) -> ShardKey:
    """Which shard a trainer rank holds."""
    tp_rank, _, _, pp_rank = layout.coordinates(rank)
    return tp_rank, pp_rank, layout.ep_rank(rank), layout.etp_rank(rank)


def trainer_exports(
    spec: ModelSpec, layout: ParallelLayout, *, dtype: torch.dtype, gpus_per_host: int
) -> list[SourceRank]:
    """The export of every trainer rank. Ranks that hold the same shard share one table."""
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in tensor_shapes(spec).items()}
    rows = padded_vocab_size(spec.vocab_size, layout.tp)
    tables: dict[ShardKey, tuple[tuple[SourceParam, ...], int]] = {}
    sources = []
    for rank in range(layout.world_size):
        key = shard_key(layout, rank)
        if key not in tables:
            tables[key] = _lay_out(trainer_shard(spec, state, layout, rank, padded_vocab_size=rows))
        params, num_bytes = tables[key]
        sources.append(
            SourceRank(
                rank=rank,
                tp_rank=key[0],
                tp_size=layout.tp,
                etp_rank=key[3],
                etp_size=layout.etp,
                host=host_name(rank, gpus_per_host),
                device=rank % gpus_per_host,
                dtype=str(dtype).removeprefix("torch."),
                buffers=(SourceBuffer(handle="", num_bytes=num_bytes),),
                params=params,
            )
        )
    return sources


def engine_params(spec: ModelSpec, *, tp: int, ep: int, dtype: torch.dtype) -> list[TargetParam]:
    """The parameters of an engine rank; names and shapes are the same on all."""
    ends = [EMBEDDING, FINAL_NORM, *([] if spec.tie_word_embeddings else [LM_HEAD])]
    layers = [
        f"model.layers.{layer}.{name}"
        for layer in range(spec.num_hidden_layers)
        for name in layer_params(spec, "sglang")
    ]
    name_of_dtype = str(dtype).removeprefix("torch.")
    return [
        TargetParam(
            name=name,
            shape=expected_sglang_shape(spec, name, tp_size=tp, ep_size=ep),
            dtype=name_of_dtype,
            element_size=dtype.itemsize,
        )
        for name in (*ends, *layers)
    ]


def _lay_out(shard: Mapping[str, Tensor]) -> tuple[tuple[SourceParam, ...], int]:
    """The parameters one after the other in one buffer, and its size."""
    params, end = [], 0
    for name, tensor in shard.items():
        params.append(SourceParam(name=name, shape=tuple(tensor.shape), buffer=0, offset_bytes=end))
        end += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return tuple(params), end
