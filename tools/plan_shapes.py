"""Exports and manifests of a 7B-shaped Qwen2 for benchmarks of plans: sizes only, no memory behind them."""

from __future__ import annotations

from mrl.reshard.families.decoder import megatron_param, sglang_param
from mrl.reshard.families.tables import Cut
from mrl.reshard.layout import SourceBuffer, SourceParam, SourceRank, TargetParam
from mrl.reshard.plan import Plan, build_plan
from mrl.reshard.spec import MixtureOfExperts, ModelSpec

HOST = "host"
ELEMENT_SIZE = 2
_BUFFER_ALIGNMENT = 64
"""Elements between the starts of parameters in a Megatron buffer."""
_VOCAB_MULTIPLE = 128
"""Both sides pad the vocabulary to a multiple of this times their tensor parallel size."""

_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    "self_attention.linear_qkv.bias": "self_attn.qkv_proj.bias",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_ENDS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def qwen2_7b(num_layers: int = 28) -> ModelSpec:
    """The shape of Qwen2.5-7B: 15.2 GB in bf16 with all 28 layers."""
    return ModelSpec(
        family="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=num_layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=True,
    )


def qwen3_moe_30b(num_layers: int = 48) -> ModelSpec:
    """The shape of Qwen3-30B-A3B: 61 GB in bf16 with all 48 layers, most of it in 128 experts a layer."""
    return ModelSpec(
        family="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_layernorm=True,
        moe=MixtureOfExperts(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    )


def source_ranks(spec: ModelSpec, *, tp: int) -> list[SourceRank]:
    """What `tp` Megatron ranks on devices 0 to tp - 1 would export: one flat bf16 buffer each, last parameter first."""
    names = [f"decoder.layers.{layer}.{name}" for layer in range(spec.num_hidden_layers) for name in _LAYER]
    return [_source_rank(spec, [*_ENDS, *names], rank, tp) for rank in range(tp)]


def target_params(spec: ModelSpec, *, tp_rank: int, tp: int) -> list[TargetParam]:
    """The bf16 parameters of SGLang's rank `tp_rank` of `tp`."""
    names = [f"model.layers.{layer}.{name}" for layer in range(spec.num_hidden_layers) for name in _LAYER.values()]
    cut, rows = Cut("SGLang", tp_rank, tp), _vocab_rows(spec, tp)
    shapes = {name: sglang_param(spec, name, cut, vocab_rows=rows).shape for name in [*_ENDS.values(), *names]}
    return [
        TargetParam(name=name, shape=shape, dtype="bfloat16", element_size=ELEMENT_SIZE)
        for name, shape in shapes.items()
    ]


def plan_of(spec: ModelSpec, *, source_tp: int, target_tp: int, tp_rank: int = 0) -> Plan:
    """The plan of an engine rank on device `tp_rank`, which shares its host with all trainer ranks."""
    sources, targets = source_ranks(spec, tp=source_tp), target_params(spec, tp_rank=tp_rank, tp=target_tp)
    return build_plan(spec, sources, targets, tp_rank=tp_rank, tp_size=target_tp, host=HOST, device=tp_rank)


def _source_rank(spec: ModelSpec, names: list[str], rank: int, tp: int) -> SourceRank:
    cut, rows = Cut("Megatron", rank, tp), _vocab_rows(spec, tp)
    params, at = [], 0
    for name in reversed(names):
        shape = megatron_param(spec, name, cut, vocab_rows=rows).shape
        params.append(SourceParam(name=name, shape=shape, buffer=0, offset_bytes=at * ELEMENT_SIZE))
        num_elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        at += -(-num_elements // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
    return SourceRank(
        rank=rank,
        tp_rank=rank,
        tp_size=tp,
        host=HOST,
        device=rank,
        dtype="bfloat16",
        buffers=(SourceBuffer(handle="", num_bytes=at * ELEMENT_SIZE),),
        params=tuple(params),
    )


def _vocab_rows(spec: ModelSpec, tp: int) -> int:
    multiple = _VOCAB_MULTIPLE * tp
    return -(-spec.vocab_size // multiple) * multiple // tp
