"""Exports and manifests of a 7B-shaped Qwen2 for benchmarks of plans: sizes only, no memory behind them."""

from __future__ import annotations

import torch

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.layout import SourceRank
from mrl.reshard.plan import Plan, build_plan
from mrl.reshard.spec import MixtureOfExperts, ModelSpec
from mrl.scale.exports import engine_params, host_name, trainer_exports


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
    """What `tp` Megatron ranks on devices 0 to tp - 1 of one host would export in bf16."""
    return trainer_exports(spec, ParallelLayout(world_size=tp, tp=tp), dtype=torch.bfloat16, gpus_per_host=tp)


def plan_of(spec: ModelSpec, *, source_tp: int, target_tp: int, tp_rank: int = 0) -> Plan:
    """The plan of an engine rank on device `tp_rank`, which shares its host with all trainer ranks."""
    sources = source_ranks(spec, tp=source_tp)
    targets = engine_params(spec, tp=target_tp, ep=1, dtype=torch.bfloat16)
    host = host_name(0, source_tp)
    return build_plan(spec, sources, targets, tp_rank=tp_rank, tp_size=target_tp, host=host, device=tp_rank)
