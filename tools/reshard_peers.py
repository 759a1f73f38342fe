"""The usual way of a weight update, for comparison: gather whole tensors, convert, send CUDA IPC handles, load.

Run by the workers of `bench_reshard.py`, each trainer rank feeding the engine rank on its GPU. What a real run adds
(requests, matching of names, the loaders' own Python) is left out, in favour of this way.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from gpu_workers import State
from reshard_sides import EngineSide, TrainerSide, megatron_shard, meta_state
from torch import Tensor

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import sglang_pieces
from mrl.reshard.spec import ModelSpec

PER_TENSOR_BUCKET_BYTES = 2 << 30
"""Handles of whole tensors are sent together up to this size: verl's default."""
FLAT_BUCKET_BYTES = 512 << 20
"""Tensors are copied into one flat tensor of this size, which has one handle: slime's default."""

Named = tuple[str, Tensor]


def join_group(state: State, *, rank: int, world_size: int, port: int) -> None:
    """Initialise NCCL among the trainer ranks."""
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    dist.barrier()


def leave_group(state: State) -> None:
    """Destroy the trainer ranks' groups."""
    dist.destroy_process_group()


def send(state: State, *, flat: bool) -> float:
    """Gather and send the whole model to the engine rank of this GPU; seconds until all ranks' are loaded."""
    side: TrainerSide = state["trainer"]
    groups = _groups(side.layout, side.rank)
    limit = FLAT_BUCKET_BYTES if flat else PER_TENSOR_BUCKET_BYTES
    dist.barrier()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for bucket in buckets(side, groups, limit, flat=flat):
        _hand_over(state["link"], _flattened(bucket) if flat else bucket)
    state["link"].send_bytes(b"")
    dist.barrier()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def receive(state: State) -> None:
    """Load what the trainer rank of this GPU sends into the engine rank's parameters."""
    side: EngineSide = state["engine"]
    places = _places(side)
    link: Connection = state["link"]
    while payload := link.recv_bytes():
        for name, tensor in _unpacked(pickle.loads(payload)):
            for target, rows, cols in places.get(name, []):
                target.copy_(tensor[rows] if tensor.dim() == 1 else tensor[rows, cols])
        torch.cuda.synchronize()
        link.send_bytes(b"loaded")


def _hand_over(link: Connection, payload: Any) -> None:
    """Send tensors by handle and keep them until they are loaded."""
    link.send_bytes(bytes(ForkingPickler.dumps(payload)))
    link.recv_bytes()


def _flattened(bucket: list[Named]) -> tuple[Tensor, list[tuple[str, torch.Size]]]:
    flat = torch.cat([tensor.reshape(-1) for _, tensor in bucket])
    return flat, [(name, tensor.shape) for name, tensor in bucket]


def _unpacked(payload: Any) -> list[Named]:
    if isinstance(payload, list):
        return payload
    flat, shapes = payload
    parts = flat.split([shape.numel() for _, shape in shapes])
    return [(name, part.view(shape)) for part, (name, shape) in zip(parts, shapes, strict=True)]


def _places(side: EngineSide) -> dict[str, list[tuple[Tensor, slice, slice]]]:
    """By Hugging Face tensor: the part of an engine parameter, and the rows and columns that belong there."""
    places: dict[str, list[tuple[Tensor, slice, slice]]] = {}
    for name, param in side.params.items():
        pieces = sglang_pieces(side.spec, name, param.shape, tp_rank=side.tp_rank, tp_size=side.tp_size)
        for piece in pieces:
            target = param.narrow(0, piece.local_row, piece.rows)
            target = target if param.dim() == 1 else target.narrow(1, piece.local_col, piece.cols)
            rows, cols = slice(piece.row, piece.row + piece.rows), slice(piece.col, piece.col + piece.cols)
            places.setdefault(piece.tensor, []).append((target, rows, cols))
        used = max((piece.local_row + piece.rows for piece in pieces), default=0)
        param.narrow(0, used, param.shape[0] - used).zero_()
    return places


def buckets(side: TrainerSide, groups: dict[str, Any], limit: int, *, flat: bool) -> Iterator[list[Named]]:
    """The model's Hugging Face tensors, whole on every rank, `limit` bytes at a time.

    Args:
        groups: the rank's "tp" and "pp" group, where it has others in them.
        flat: wait for the gathers of a bucket together; otherwise for each parameter's.
    """
    pending: list[tuple[str, list[Tensor], Any]] = []
    size = 0
    for name, owner, shape in _parameters(side):
        shards, work = _gather(side, groups, name, owner, shape)
        if work and not flat:
            work.wait()
        pending.append((name, shards, work))
        size += sum(shard.nbytes for shard in shards)
        if size >= limit:
            yield _converted(side.spec, pending)
            pending, size = [], 0
    if pending:
        yield _converted(side.spec, pending)


def _converted(spec: ModelSpec, pending: list[tuple[str, list[Tensor], Any]]) -> list[Named]:
    for _, _, work in pending:
        if work:
            work.wait()
    return [item for name, shards, _ in pending for item in to_hugging_face(spec, name, shards)]


def _parameters(side: TrainerSide) -> list[tuple[str, int, torch.Size]]:
    """(name, rank that owns this rank's share of it, shape) of all stages."""
    layout, per_stage = side.layout, side.layout.world_size // side.layout.pp
    result, state = [], meta_state(side.spec)
    for stage in range(layout.pp):
        owner = stage * per_stage + side.rank % per_stage
        shard = megatron_shard(side.spec, state, layout, owner)
        result += [(name, owner, tensor.shape) for name, tensor in shard.items()]
    return result


def _gather(
    side: TrainerSide, groups: dict[str, Any], name: str, owner: int, shape: torch.Size
) -> tuple[list[Tensor], Any]:
    """All tensor parallel shards of a parameter, and the work to wait for before they are read."""
    shard = side.params.get(name)
    if side.layout.pp > 1:
        shard = torch.empty(shape, dtype=torch.bfloat16, device="cuda") if shard is None else shard
        dist.broadcast(shard, src=owner, group=groups["pp"])
    assert shard is not None, f"rank {side.rank} lacks {name}"
    if side.layout.tp == 1 or "norm" in name:
        return [shard], None
    shards = [torch.empty_like(shard) for _ in range(side.layout.tp)]
    return shards, dist.all_gather(shards, shard, group=groups["tp"], async_op=True)


def _groups(layout: ParallelLayout, rank: int) -> dict[str, Any]:
    """This rank's tensor and pipeline parallel groups; made once."""
    key = (layout, rank)
    if key not in _GROUPS:
        tp, _, dp, pp = zip(*(layout.coordinates(each) for each in range(layout.world_size)), strict=True)
        mine: dict[str, Any] = {}
        for kind, others in (("tp", list(zip(dp, pp, strict=True))), ("pp", list(zip(tp, dp, strict=True)))):
            for value in sorted(set(others)):
                ranks = [each for each, other in enumerate(others) if other == value]
                group = dist.new_group(ranks)
                mine |= {kind: group} if rank in ranks else {}
        _GROUPS[key] = mine
    return _GROUPS[key]


_GROUPS: dict[tuple[ParallelLayout, int], dict[str, Any]] = {}


def to_hugging_face(spec: ModelSpec, name: str, shards: list[Tensor]) -> list[Named]:
    """A Megatron parameter's shards as checkpoint tensors; views where this way makes no copy."""
    if name == "embedding.word_embeddings.weight":
        return [("model.embed_tokens.weight", _joined(shards)[: spec.vocab_size])]
    if name == "output_layer.weight":
        return [("lm_head.weight", _joined(shards)[: spec.vocab_size])]
    if name == "decoder.final_layernorm.weight":
        return [("model.norm.weight", shards[0])]
    _, _, layer, kind = name.split(".", 3)
    return [(f"model.layers.{layer}.{part}", tensor) for part, tensor in _layer_tensors(spec, kind, shards)]


def _layer_tensors(spec: ModelSpec, kind: str, shards: list[Tensor]) -> list[Named]:
    if kind == "input_layernorm.weight":
        return [(kind, shards[0])]
    if kind == "pre_mlp_layernorm.weight":
        return [("post_attention_layernorm.weight", shards[0])]
    if kind.startswith("self_attention.linear_qkv."):
        suffix = kind.rpartition(".")[2]
        return [(f"self_attn.{part}_proj.{suffix}", tensor) for part, tensor in _qkv(spec, _joined(shards))]
    if kind == "self_attention.linear_proj.weight":
        return [("self_attn.o_proj.weight", _joined(shards, dim=1))]
    if kind == "mlp.linear_fc1.weight":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [("mlp.gate_proj.weight", _joined(list(gates))), ("mlp.up_proj.weight", _joined(list(ups)))]
    assert kind == "mlp.linear_fc2.weight", kind
    return [("mlp.down_proj.weight", _joined(shards, dim=1))]


def _qkv(spec: ModelSpec, whole: Tensor) -> list[Named]:
    groups, dim = spec.num_key_value_heads, spec.head_dim
    grouped = whole.reshape(groups, -1, *whole.shape[1:])
    parts = grouped.split([grouped.shape[1] - 2 * dim, dim, dim], dim=1)
    return [(part, tensor.flatten(0, 1)) for part, tensor in zip("qkv", parts, strict=True)]


def _joined(shards: list[Tensor], dim: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)
