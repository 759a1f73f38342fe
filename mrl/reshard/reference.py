"""Hugging Face weights to Megatron shards and back, and to engine shards: the slow path that checks the tables.

Cat, reshape and chunk, without the layout tables on purpose; it holds whole tensors and is used by checks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mrl.reshard.families import families
from mrl.reshard.families.family import ExpertNames
from mrl.reshard.spec import ModelSpec

StateDict = Mapping[str, Tensor]
_LAYER_NORMS = (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"))


def megatron_shard(
    state: StateDict,
    spec: ModelSpec,
    *,
    tp_rank: int,
    tp_size: int,
    layers: Sequence[int],
    pre_process: bool,
    post_process: bool,
    padded_vocab_size: int,
    experts: Sequence[int] = (),
    etp_rank: int = 0,
    etp_size: int = 1,
) -> dict[str, Tensor]:
    """One rank's parameters (local spec names, global layer and expert numbers) from a whole Hugging Face state dict.

    Args:
        layers: global indices of the rank's layers, over all its model chunks.
        pre_process, post_process: the rank holds the embedding; the final norm and the output layer. A tied output
            layer is held only where the embedding is not, as in GPTModel.
        experts: global numbers of the rank's experts, of a model that has any.
        etp_rank, etp_size: the rank's place among those that share each of them.
    """

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size)[tp_rank].contiguous()

    def columns(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size, dim=1)[tp_rank].contiguous()

    shard: dict[str, Tensor] = {}
    if pre_process:
        shard["embedding.word_embeddings.weight"] = rows(_padded(state["model.embed_tokens.weight"], padded_vocab_size))
    for layer in layers:
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for megatron, hugging_face in _LAYER_NORMS:
            shard[f"{target}{megatron}.weight"] = state[f"{source}{hugging_face}.weight"]
        for kind in ("weight", "bias") if spec.attention_bias else ("weight",):
            q, k, v = (state[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv")
            shard[f"{target}self_attention.linear_qkv.{kind}"] = rows(_interleave_groups(spec, q, k, v))
        for name in ("q", "k") if spec.qk_layernorm else ():
            shard[f"{target}self_attention.{name}_layernorm.weight"] = state[f"{source}self_attn.{name}_norm.weight"]
        shard[target + "self_attention.linear_proj.weight"] = columns(state[source + "self_attn.o_proj.weight"])
        if spec.moe:
            shard |= _megatron_experts(state, spec, source, target, experts, etp_rank=etp_rank, etp_size=etp_size)
            continue
        gate, up = (rows(state[f"{source}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        shard[target + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        shard[target + "mlp.linear_fc2.weight"] = columns(state[source + "mlp.down_proj.weight"])
    if post_process:
        shard["decoder.final_layernorm.weight"] = state["model.norm.weight"]
    if post_process and not (spec.tie_word_embeddings and pre_process):
        head = state["model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"]
        shard["output_layer.weight"] = rows(_padded(head, padded_vocab_size))
    return shard


def _megatron_experts(
    state: StateDict,
    spec: ModelSpec,
    source: str,
    target: str,
    experts: Sequence[int],
    *,
    etp_rank: int,
    etp_size: int,
) -> dict[str, Tensor]:
    names = _expert_names(spec)
    shard = {target + "mlp.router.weight": state[f"{source}{names.module}.gate.weight"]}
    for expert in experts:
        prefix, local = f"{source}{names.module}.experts.{expert}.", f"{target}mlp.experts.local_experts.{expert}."
        gate, up, down = (state[f"{prefix}{name}.weight"] for name in (names.gate, names.up, names.down))
        halves = [matrix.chunk(etp_size)[etp_rank] for matrix in (gate, up)]
        shard[local + "linear_fc1.weight"] = torch.cat(halves)
        shard[local + "linear_fc2.weight"] = down.chunk(etp_size, dim=1)[etp_rank].contiguous()
    return shard


def _expert_names(spec: ModelSpec) -> ExpertNames:
    names = families()[spec.family].experts
    assert names is not None, f"{spec.family} has no experts"
    return names


def hugging_face_state(
    stages: Sequence[Sequence[Mapping[str, Tensor]]], spec: ModelSpec, *, etp_size: int = 1
) -> dict[str, Tensor]:
    """The whole Hugging Face state dict from `stages[pp_rank][tp_rank]`, shards that have every expert between them.

    Args:
        etp_size: number of consecutive shards that share an expert.
    """
    state: dict[str, Tensor] = {}
    for stage in stages:
        for name in {name: None for shard in stage for name in shard}:
            shards = [shard[name] for shard in stage if name in shard]
            _unshard(name, shards[:etp_size] if ".mlp.experts." in name else shards, spec, state)
    return state


def _unshard(name: str, shards: list[Tensor], spec: ModelSpec, state: dict[str, Tensor]) -> None:
    if name == "embedding.word_embeddings.weight":
        state["model.embed_tokens.weight"] = torch.cat(shards)[: spec.vocab_size]
    elif name == "output_layer.weight":
        if not spec.tie_word_embeddings:
            state["lm_head.weight"] = torch.cat(shards)[: spec.vocab_size]
    elif name == "decoder.final_layernorm.weight":
        state["model.norm.weight"] = shards[0]
    else:
        _, _, layer, kind = name.split(".", 3)
        _unshard_layer(f"model.layers.{layer}.", kind, shards, spec, state)


def _unshard_layer(prefix: str, kind: str, shards: list[Tensor], spec: ModelSpec, state: dict[str, Tensor]) -> None:
    for megatron, hugging_face in _LAYER_NORMS:
        if kind == f"{megatron}.weight":
            state[f"{prefix}{hugging_face}.weight"] = shards[0]
    for name in ("q", "k"):
        if kind == f"self_attention.{name}_layernorm.weight":
            state[f"{prefix}self_attn.{name}_norm.weight"] = shards[0]
    if kind.startswith("self_attention.linear_qkv."):
        suffix = kind.rpartition(".")[2]
        for name, tensor in zip("qkv", _split_groups(spec, torch.cat(shards)), strict=True):
            state[f"{prefix}self_attn.{name}_proj.{suffix}"] = tensor
    elif kind == "mlp.router.weight":
        state[f"{prefix}{_expert_names(spec).module}.gate.weight"] = shards[0]
    elif kind.startswith("mlp.experts."):
        names, (_, _, _, expert, matrix, _) = _expert_names(spec), kind.split(".")
        stem = f"{prefix}{names.module}.experts.{expert}."
        if matrix == "linear_fc1":
            state[f"{stem}{names.gate}.weight"], state[f"{stem}{names.up}.weight"] = _gate_and_up(shards)
        else:
            state[f"{stem}{names.down}.weight"] = torch.cat(shards, dim=1)
    elif kind == "self_attention.linear_proj.weight":
        state[prefix + "self_attn.o_proj.weight"] = torch.cat(shards, dim=1)
    elif kind == "mlp.linear_fc1.weight":
        state[prefix + "mlp.gate_proj.weight"], state[prefix + "mlp.up_proj.weight"] = _gate_and_up(shards)
    elif kind == "mlp.linear_fc2.weight":
        state[prefix + "mlp.down_proj.weight"] = torch.cat(shards, dim=1)


def _gate_and_up(shards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The whole matrices of shards that have a part of either."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def _interleave_groups(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[q heads x dim, ...], [kv heads x dim, ...] twice -> per query group [its q heads, k, v]."""
    grouped = [tensor.reshape(spec.num_key_value_heads, -1, *tensor.shape[1:]) for tensor in (q, k, v)]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_groups(spec: ModelSpec, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `_interleave_groups`."""
    grouped = qkv.reshape(spec.num_key_value_heads, -1, *qkv.shape[1:])
    q, k, v = grouped.split([grouped.shape[1] - 2 * spec.head_dim, spec.head_dim, spec.head_dim], dim=1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def sglang_shard(
    state: StateDict, spec: ModelSpec, *, tp_rank: int, tp_size: int, padded_vocab_size: int, ep_size: int = 1
) -> dict[str, Tensor]:
    """One engine rank's parameters from a whole Hugging Face state dict, KV heads replicated if fewer than ranks."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size)[tp_rank]

    replicas = max(1, tp_size // spec.num_key_value_heads)

    def kv_rows(tensor: Tensor) -> Tensor:
        heads = tensor.reshape(spec.num_key_value_heads, spec.head_dim, *tensor.shape[1:])
        return rows(heads.repeat_interleave(replicas, dim=0)).flatten(0, 1)

    def columns(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size, dim=1)[tp_rank].contiguous()

    shard = {
        "model.embed_tokens.weight": rows(_padded(state["model.embed_tokens.weight"], padded_vocab_size)),
        "model.norm.weight": state["model.norm.weight"],
    }
    if not spec.tie_word_embeddings:
        shard["lm_head.weight"] = rows(_padded(state["lm_head.weight"], padded_vocab_size))
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shard[prefix + norm] = state[prefix + norm]
        for kind in ("weight", "bias") if spec.attention_bias else ("weight",):
            q, k, v = (state[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv")
            shard[f"{prefix}self_attn.qkv_proj.{kind}"] = torch.cat([rows(q), kv_rows(k), kv_rows(v)])
        for name in ("q", "k") if spec.qk_layernorm else ():
            norm = f"{prefix}self_attn.{name}_norm.weight"
            shard[norm] = state[norm]
        shard[prefix + "self_attn.o_proj.weight"] = columns(state[prefix + "self_attn.o_proj.weight"])
        if spec.moe:
            shard |= _sglang_experts(state, spec, prefix, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size)
            continue
        gate, up = (rows(state[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        shard[prefix + "mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        shard[prefix + "mlp.down_proj.weight"] = columns(state[prefix + "mlp.down_proj.weight"])
    return shard


def _sglang_experts(
    state: StateDict, spec: ModelSpec, prefix: str, *, tp_rank: int, tp_size: int, ep_size: int
) -> dict[str, Tensor]:
    assert spec.moe is not None
    names, within = _expert_names(spec), tp_size // ep_size
    module = prefix + names.module
    experts = torch.arange(spec.moe.num_experts).chunk(ep_size)[tp_rank // within].tolist()
    w13, w2 = [], []
    for expert in experts:
        gate, up, down = (
            state[f"{module}.experts.{expert}.{name}.weight"] for name in (names.gate, names.up, names.down)
        )
        w13.append(torch.cat([matrix.chunk(within)[tp_rank % within] for matrix in (gate, up)]))
        w2.append(down.chunk(within, dim=1)[tp_rank % within])
    return {
        f"{module}.gate.weight": state[f"{module}.gate.weight"],
        f"{module}.experts.w13_weight": torch.stack(w13),
        f"{module}.experts.w2_weight": torch.stack(w2),
    }
