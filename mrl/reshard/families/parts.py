"""The parts of which families put their layers together, as Hugging Face, Megatron and SGLang lay them out.

- Megatron `linear_qkv`: rows of one global axis, per query group [its q heads, k, v], cut uniformly over TP. With
  fewer groups than ranks the cut goes through a group.
- SGLang `qkv_proj`: [q heads of the rank; its k heads; its v heads]; with fewer KV heads than ranks each KV head is
  replicated on consecutive ranks (the CUDA rule).
- Both `linear_fc1` and `gate_up_proj`: [gate of the rank; up of the rank].
"""

from __future__ import annotations

from mrl.reshard.families.family import ExpertNames
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

_EXPERT_SIZE = "intermediate size of an expert"


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


def mixture_of_experts(spec: ModelSpec, names: ExpertNames) -> Part:
    """A router and its experts, each SwiGLU.

    Megatron cuts each of a rank's experts over its expert tensor parallel ranks, as it cuts a dense MLP over the tensor
    parallel ones: one module an expert in the local spec, numbered parameters of one module in transformer-engine's.
    SGLang holds all of a rank's experts in two parameters, w13 [experts, gate rows then up rows, hidden] and w2
    [experts, hidden, ffn], cut over the ranks that share an expert.
    """
    assert spec.moe is not None, f"{spec.family} has experts, but its spec says nothing of them"
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    router = f"{names.module}.gate.weight"
    tensors: dict[str, tuple[int, ...]] = {router: (spec.moe.num_experts, hidden)}
    router_rule = replicated(router, spec.moe.num_experts, hidden)
    megatron = {"mlp.router.weight": router_rule}
    for expert in range(spec.moe.num_experts):
        gate, up, down = _expert_tensors(names, expert)
        tensors |= {gate: (ffn, hidden), up: (ffn, hidden), down: (hidden, ffn)}
        into = _of_expert(stacked_row_shares((gate, up), ffn, hidden, _EXPERT_SIZE))
        out = _of_expert(column_share(down, hidden, ffn, _EXPERT_SIZE))
        local = f"mlp.experts.local_experts.{expert}"
        megatron |= {f"{local}.linear_fc1.weight": into, f"{local}.linear_fc2.weight": out}
        megatron |= {f"mlp.experts.linear_fc{n}.weight{expert}": rule for n, rule in ((1, into), (2, out))}
    return Part(
        tensors=tensors,
        megatron=megatron,
        sglang={
            router: router_rule,
            f"{names.module}.experts.w13_weight": _sglang_w13(spec, names),
            f"{names.module}.experts.w2_weight": _sglang_w2(spec, names),
        },
    )


def dense_layer(spec: ModelSpec) -> list[Part]:
    """The layer of Llama and its relatives."""
    return [norms(spec), attention(spec), mlp(spec)]


def moe_layer(spec: ModelSpec, names: ExpertNames) -> list[Part]:
    """The layer of Mixtral and its relatives."""
    return [norms(spec), attention(spec), mixture_of_experts(spec, names)]


def _expert_tensors(names: ExpertNames, expert: int) -> tuple[str, str, str]:
    """Checkpoint names of an expert's gate, up and down projections."""
    gate, up, down = (f"{names.module}.experts.{expert}.{name}.weight" for name in (names.gate, names.up, names.down))
    return gate, up, down


def _of_expert(rule: Rule) -> Rule:
    """The rule on Megatron's expert tensor parallel axis."""
    return lambda cut, prefix: rule(cut.of_expert(), prefix)


def _sglang_w13(spec: ModelSpec, names: ExpertNames) -> Rule:
    def rule(cut: Cut, prefix: str) -> LocalParam:
        assert spec.moe is not None
        experts, within = cut.experts(spec.moe.num_experts)
        share = within.share(spec.intermediate_size, _EXPERT_SIZE)
        segments = [
            Segment(prefix + tensor, share * within.rank, share)
            for expert in experts
            for tensor in _expert_tensors(names, expert)[:2]
        ]
        return LocalParam((len(experts), 2 * share, spec.hidden_size), stack(segments, spec.hidden_size))

    return rule


def _sglang_w2(spec: ModelSpec, names: ExpertNames) -> Rule:
    def rule(cut: Cut, prefix: str) -> LocalParam:
        assert spec.moe is not None
        experts, within = cut.experts(spec.moe.num_experts)
        rows, share = spec.hidden_size, within.share(spec.intermediate_size, _EXPERT_SIZE)
        pieces = [
            Piece(prefix + _expert_tensors(names, expert)[2], 0, share * within.rank, rows, share, rows * number, 0)
            for number, expert in enumerate(experts)
        ]
        return LocalParam((len(experts), rows, share), pieces)

    return rule


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
