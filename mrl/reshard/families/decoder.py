"""The layout of a RoPE, RMSNorm, SwiGLU decoder in Hugging Face, Megatron and SGLang.

Every local parameter is described as boxes of canonical Hugging Face tensors. The rules:

- Megatron `linear_qkv`: rows of one global axis, per query group [its q heads, k, v], cut uniformly over TP. With
  fewer groups than ranks the cut goes through a group.
- SGLang `qkv_proj`: [q heads of the rank; its k heads; its v heads]; with fewer KV heads than ranks each KV head is
  replicated on consecutive ranks (the CUDA rule).
- Both `linear_fc1` and `gate_up_proj`: [gate of the rank; up of the rank].
- Vocabulary: rows are padded by the owner of the parameter and cut uniformly; rows past the vocabulary belong to no
  Hugging Face tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
VOCABULARY_PARAMS = frozenset({"embedding.word_embeddings.weight", "output_layer.weight", EMBEDDING, LM_HEAD})
_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
_SGLANG_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's place on the tensor-parallel axis of one side."""

    side: str
    rank: int
    size: int

    def share(self, total: int, what: str) -> int:
        """`total` divided over the axis; ValueError if it does not divide."""
        if total % self.size:
            raise ValueError(f"{what} = {total} is not divisible by the {self.side} tensor parallel size {self.size}")
        return total // self.size


@dataclass(frozen=True, slots=True)
class LocalParam:
    """What a rank holds under one parameter name: its shape and the boxes that fill it."""

    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a Hugging Face tensor."""

    tensor: str
    row: int
    rows: int


Rule = Callable[[ModelSpec, Cut, str], LocalParam]
"""(spec, cut, Hugging Face prefix of the layer) -> local parameter."""


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical Hugging Face tensor names and shapes; a tied `lm_head.weight` is not listed."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if spec.attention_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes[FINAL_NORM] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    return shapes


def megatron_param(spec: ModelSpec, name: str, cut: Cut, *, vocab_rows: int) -> LocalParam:
    """A parameter of Megatron's GPTModel; `vocab_rows` is the padded vocabulary's share of one rank."""
    if name == "embedding.word_embeddings.weight":
        return _vocabulary(spec, EMBEDDING, cut, vocab_rows)
    if name == "output_layer.weight":
        return _vocabulary(spec, EMBEDDING if spec.tie_word_embeddings else LM_HEAD, cut, vocab_rows)
    if name == "decoder.final_layernorm.weight":
        return _norm(spec, FINAL_NORM)
    return _layer_param(spec, name, cut, _MEGATRON_LAYER, _MEGATRON_RULES)


def sglang_param(spec: ModelSpec, name: str, cut: Cut, *, vocab_rows: int) -> LocalParam:
    """A parameter of SGLang's LlamaForCausalLM or Qwen2ForCausalLM, without pipeline parallelism."""
    if name == EMBEDDING:
        return _vocabulary(spec, EMBEDDING, cut, vocab_rows)
    if name == LM_HEAD:
        return _vocabulary(spec, EMBEDDING if spec.tie_word_embeddings else LM_HEAD, cut, vocab_rows)
    if name == FINAL_NORM:
        return _norm(spec, FINAL_NORM)
    return _layer_param(spec, name, cut, _SGLANG_LAYER, _SGLANG_RULES)


def _layer_param(spec: ModelSpec, name: str, cut: Cut, pattern: re.Pattern[str], rules: dict[str, Rule]) -> LocalParam:
    match = pattern.match(name)
    rule = rules.get(match[2]) if match else None
    if match is None or rule is None:
        raise ValueError(f"{cut.side} parameter {name} has no place in a {spec.family} checkpoint")
    layer = int(match[1])
    if layer >= spec.num_hidden_layers:
        raise ValueError(
            f"{cut.side} parameter {name} names layer {layer}, but the model has {spec.num_hidden_layers} layers; "
            "layer numbers must be global"
        )
    if match[2].endswith("bias") and not spec.attention_bias:
        raise ValueError(f"{cut.side} parameter {name} is a bias, but {spec.family} has no bias on q, k and v")
    return rule(spec, cut, f"model.layers.{layer}.")


def _stack(segments: Iterable[Segment], cols: int, start: int = 0, stop: int | None = None) -> list[Piece]:
    """Pieces of the rows [start, stop) of the segments laid end to end, at local row 0."""
    pieces, at = [], 0
    for segment in segments:
        low = max(at, start)
        high = at + segment.rows if stop is None else min(at + segment.rows, stop)
        if low < high:
            pieces.append(Piece(segment.tensor, segment.row + low - at, 0, high - low, cols, low - start, 0))
        at += segment.rows
    return pieces


def _vocabulary(spec: ModelSpec, tensor: str, cut: Cut, rows: int) -> LocalParam:
    if rows * cut.size < spec.vocab_size:
        raise ValueError(
            f"{cut.side} holds {rows} vocabulary rows on each of {cut.size} ranks, fewer than the {spec.vocab_size} "
            f"of {tensor}"
        )
    start = rows * cut.rank
    pieces = _stack([Segment(tensor, 0, spec.vocab_size)], spec.hidden_size, start, start + rows)
    return LocalParam((rows, spec.hidden_size), pieces)


def _norm(spec: ModelSpec, tensor: str) -> LocalParam:
    return LocalParam((spec.hidden_size,), _stack([Segment(tensor, 0, spec.hidden_size)], 1))


def _layer_norm(suffix: str) -> Rule:
    return lambda spec, cut, prefix: _norm(spec, prefix + suffix)


def _column_share(tensor: str, rows: int, cols: int, cut: Cut, what: str) -> LocalParam:
    share = cut.share(cols, what)
    return LocalParam((rows, share), [Piece(tensor, 0, share * cut.rank, rows, share, 0, 0)])


def _attention_output(spec: ModelSpec, cut: Cut, prefix: str) -> LocalParam:
    cols = spec.num_attention_heads * spec.head_dim
    return _column_share(prefix + "self_attn.o_proj.weight", spec.hidden_size, cols, cut, "columns of o_proj")


def _mlp_output(spec: ModelSpec, cut: Cut, prefix: str) -> LocalParam:
    tensor = prefix + "mlp.down_proj.weight"
    return _column_share(tensor, spec.hidden_size, spec.intermediate_size, cut, "intermediate_size")


def _mlp_input(spec: ModelSpec, cut: Cut, prefix: str) -> LocalParam:
    share = cut.share(spec.intermediate_size, "intermediate_size")
    segments = [Segment(f"{prefix}mlp.{name}_proj.weight", share * cut.rank, share) for name in ("gate", "up")]
    return LocalParam((2 * share, spec.hidden_size), _stack(segments, spec.hidden_size))


def _megatron_qkv(kind: str) -> Rule:
    def rule(spec: ModelSpec, cut: Cut, prefix: str) -> LocalParam:
        groups, dim = spec.num_key_value_heads, spec.head_dim
        q_rows = spec.num_attention_heads // groups * dim
        share = cut.share(groups * (q_rows + 2 * dim), "rows of linear_qkv")
        segments = [
            Segment(f"{prefix}self_attn.{name}_proj.{kind}", group * rows, rows)
            for group in range(groups)
            for name, rows in (("q", q_rows), ("k", dim), ("v", dim))
        ]
        return _qkv_param(spec, kind, _stack(segments, _qkv_cols(spec, kind), share * cut.rank, share * (cut.rank + 1)))

    return rule


def _sglang_qkv(kind: str) -> Rule:
    def rule(spec: ModelSpec, cut: Cut, prefix: str) -> LocalParam:
        q_rows = cut.share(spec.num_attention_heads, "num_attention_heads") * spec.head_dim
        kv_first, kv_heads = _sglang_kv_heads(spec.num_key_value_heads, cut)
        kv_row, kv_rows = kv_first * spec.head_dim, kv_heads * spec.head_dim
        boxes = (("q", q_rows * cut.rank, q_rows), ("k", kv_row, kv_rows), ("v", kv_row, kv_rows))
        segments = [Segment(f"{prefix}self_attn.{name}_proj.{kind}", row, rows) for name, row, rows in boxes]
        return _qkv_param(spec, kind, _stack(segments, _qkv_cols(spec, kind)))

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


_MEGATRON_RULES: dict[str, Rule] = {
    "input_layernorm.weight": _layer_norm("input_layernorm.weight"),
    "self_attention.linear_qkv.layer_norm_weight": _layer_norm("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _megatron_qkv("weight"),
    "self_attention.linear_qkv.bias": _megatron_qkv("bias"),
    "self_attention.linear_proj.weight": _attention_output,
    "pre_mlp_layernorm.weight": _layer_norm("post_attention_layernorm.weight"),
    "mlp.linear_fc1.layer_norm_weight": _layer_norm("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _mlp_input,
    "mlp.linear_fc2.weight": _mlp_output,
}

_SGLANG_RULES: dict[str, Rule] = {
    "input_layernorm.weight": _layer_norm("input_layernorm.weight"),
    "self_attn.qkv_proj.weight": _sglang_qkv("weight"),
    "self_attn.qkv_proj.bias": _sglang_qkv("bias"),
    "self_attn.o_proj.weight": _attention_output,
    "post_attention_layernorm.weight": _layer_norm("post_attention_layernorm.weight"),
    "mlp.gate_up_proj.weight": _mlp_input,
    "mlp.down_proj.weight": _mlp_output,
}
