"""The parts of which families put their layers together, as Hugging Face, Megatron and SGLang lay them out.

- Megatron `linear_qkv`: rows of one global axis, per query group [its q heads, k, v], cut uniformly over TP. With
  fewer groups than ranks the cut goes through a group.
- SGLang `qkv_proj`: [q heads of the rank; its k heads; its v heads]; with fewer KV heads than ranks each KV head is
  replicated on consecutive ranks (the CUDA rule).
- Both `linear_fc1` and `gate_up_proj`: [gate of the rank; up of the rank].
"""

from __future__ import annotations

from mrl.reshard.families.tables import (
    Cut,
    LocalParam,
    Part,
    Rule,
    Segment,
    column_share,
    replicated,
    stack,
    stacked_row_shares,
)
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec


def norms(spec: ModelSpec) -> Part:
    """RMSNorms before attention and before the MLP; transformer-engine keeps them in the linear layer that follows."""
    before_attention = "input_layernorm.weight"
    before_mlp = "post_attention_layernorm.weight"
    attention = replicated(before_attention, spec.hidden_size)
    mlp = replicated(before_mlp, spec.hidden_size)
    return Part(
        tensors={before_attention: (spec.hidden_size,), before_mlp: (spec.hidden_size,)},
        megatron={
            "input_layernorm.weight": attention,
            "self_attention.linear_qkv.layer_norm_weight": attention,
            "pre_mlp_layernorm.weight": mlp,
            "mlp.linear_fc1.layer_norm_weight": mlp,
        },
        sglang={before_attention: attention, before_mlp: mlp},
    )


def attention(spec: ModelSpec) -> Part:
    """Grouped-query attention, with what the spec says of biases and of norms on q and k."""
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    tensors: dict[str, tuple[int, ...]] = {}
    megatron: dict[str, Rule] = {}
    sglang: dict[str, Rule] = {}
    for kind in ("weight", "bias") if spec.attention_bias else ("weight",):
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"self_attn.{name}_proj.{kind}"] = (rows,) if kind == "bias" else (rows, spec.hidden_size)
        megatron[f"self_attention.linear_qkv.{kind}"] = _megatron_qkv(spec, kind)
        sglang[f"self_attn.qkv_proj.{kind}"] = _sglang_qkv(spec, kind)
    output = "self_attn.o_proj.weight"
    tensors[output] = (spec.hidden_size, q)
    rule = column_share(output, spec.hidden_size, q, "columns of o_proj")
    megatron["self_attention.linear_proj.weight"] = sglang[output] = rule
    for name in ("q", "k") if spec.qk_layernorm else ():
        norm = f"self_attn.{name}_norm.weight"
        tensors[norm] = (spec.head_dim,)
        rule = replicated(norm, spec.head_dim)
        megatron[f"self_attention.{name}_layernorm.weight"] = sglang[norm] = rule
    return Part(tensors=tensors, megatron=megatron, sglang=sglang)


def mlp(spec: ModelSpec) -> Part:
    """SwiGLU."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    gate, up, down = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    into = stacked_row_shares((gate, up), ffn, hidden, "intermediate_size")
    out = column_share(down, hidden, ffn, "intermediate_size")
    return Part(
        tensors={gate: (ffn, hidden), up: (ffn, hidden), down: (hidden, ffn)},
        megatron={"mlp.linear_fc1.weight": into, "mlp.linear_fc2.weight": out},
        sglang={"mlp.gate_up_proj.weight": into, "mlp.down_proj.weight": out},
    )


def dense_layer(spec: ModelSpec) -> list[Part]:
    """The layer of Llama and its relatives."""
    return [norms(spec), attention(spec), mlp(spec)]


def _megatron_qkv(spec: ModelSpec, kind: str) -> Rule:
    groups, dim = spec.num_key_value_heads, spec.head_dim
    q_rows = spec.num_attention_heads // groups * dim

    def rule(cut: Cut, prefix: str) -> LocalParam:
        share = cut.share(groups * (q_rows + 2 * dim), "rows of linear_qkv")
        segments = [
            Segment(f"{prefix}self_attn.{name}_proj.{kind}", group * rows, rows)
            for group in range(groups)
            for name, rows in (("q", q_rows), ("k", dim), ("v", dim))
        ]
        return _qkv_param(spec, kind, stack(segments, _qkv_cols(spec, kind), share * cut.rank, share * (cut.rank + 1)))

    return rule


def _sglang_qkv(spec: ModelSpec, kind: str) -> Rule:
    def rule(cut: Cut, prefix: str) -> LocalParam:
        q_rows = cut.share(spec.num_attention_heads, "num_attention_heads") * spec.head_dim
        kv_first, kv_heads = _sglang_kv_heads(spec.num_key_value_heads, cut)
        kv_row, kv_rows = kv_first * spec.head_dim, kv_heads * spec.head_dim
        boxes = (("q", q_rows * cut.rank, q_rows), ("k", kv_row, kv_rows), ("v", kv_row, kv_rows))
        segments = [Segment(f"{prefix}self_attn.{name}_proj.{kind}", row, rows) for name, row, rows in boxes]
        return _qkv_param(spec, kind, stack(segments, _qkv_cols(spec, kind)))

    return rule


def _sglang_kv_heads(kv_heads: int, cut: Cut) -> tuple[int, int]:
    """(first, number) of the rank's KV heads."""
    if kv_heads >= cut.size:
        share = cut.share(kv_heads, "num_key_value_heads")
        return share * cut.rank, share
    if cut.size % kv_heads:
        raise ValueError(f"{cut.side} tensor parallel size {cut.size} is not a multiple of {kv_heads} key/value heads")
    return cut.rank // (cut.size // kv_heads), 1


def _qkv_cols(spec: ModelSpec, kind: str) -> int:
    return 1 if kind == "bias" else spec.hidden_size


def _qkv_param(spec: ModelSpec, kind: str, pieces: list[Piece]) -> LocalParam:
    rows = sum(piece.rows for piece in pieces)
    return LocalParam((rows,) if kind == "bias" else (rows, spec.hidden_size), pieces)
