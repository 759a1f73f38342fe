"""From a `ModelSpec` and a `ParallelLayout` to this rank's Megatron model chunks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    TENorm,
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from mrl.backends.megatron.attention import SequenceAttention
from mrl.backends.megatron.norm import RMSNorm
from mrl.backends.megatron.rope import PackedRotary, scaled_frequencies
from mrl.backends.megatron.value_head import ValueHead
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import padded_vocab_size
from mrl.reshard.spec import ModelSpec

logger = logging.getLogger(__name__)

_LAYER_PREFIX = "decoder.layers."
_EXPERT = re.compile(r"(\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


@dataclass(kw_only=True, frozen=True)
class Recompute:
    """Which activations are recomputed in the backward pass; Megatron's own words and meanings."""

    granularity: Literal["selective", "full"] | None = None
    method: Literal["uniform", "block"] | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ("core_attn",)
    """For "selective"."""

    def config_fields(self) -> dict[str, Any]:
        """The fields of TransformerConfig."""
        if self.granularity is None:
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method or "uniform",
            "recompute_num_layers": self.num_layers or 1,
        }


@dataclass(frozen=True)
class ModelChunk:
    """One virtual pipeline stage: the bare GPTModel and the module that runs (the same, or cast to bfloat16)."""

    bare: GPTModel
    module: torch.nn.Module
    layers: range
    """Global indices of its layers."""
    experts: range
    """Global numbers of its experts in each layer."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Megatron's names with the layer's and the expert's global number."""
        for name, parameter in self.bare.named_parameters():
            if name.startswith(_LAYER_PREFIX):
                number, rest = name.removeprefix(_LAYER_PREFIX).split(".", 1)
                name = f"{_LAYER_PREFIX}{self.layers[int(number)]}.{rest}"
            yield shift_expert(name, self.experts.start), parameter


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter belongs to one expert."""
    return _EXPERT.search(name) is not None


def shift_expert(name: str, distance: int) -> str:
    """The name of the same parameter of the expert `distance` further; other names as they are."""
    return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + distance}", name)


def transformer_config(
    spec: ModelSpec, layout: ParallelLayout, *, dtype: torch.dtype, recompute: Recompute
) -> TransformerConfig:
    """Megatron's config of the model. Weights are not initialised: a checkpoint fills them."""
    fused = _use_transformer_engine()
    return TransformerConfig(
        num_layers=spec.num_hidden_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_key_value_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.attention_bias,
        qk_layernorm=spec.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        variable_seq_lengths=layout.pp > 1,
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,
        # The default dispatcher is refused with variable sequence lengths even for dense models.
        moe_token_dispatcher_type="alltoall",
        **_expert_fields(spec),
        # Losses arrive divided by their mini-batch's denominators: neither the schedule nor DDP may divide again.
        calculate_per_token_loss=True,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_virtual_pipeline_fields(layout),
        **recompute.config_fields(),
    )


def _expert_fields(spec: ModelSpec) -> dict[str, Any]:
    """Routing as in transformers: softmax, no token dropped, no loss but the caller's.

    Megatron takes the softmax over all experts or over the chosen ones; the latter is the former scaled to a sum of 1.
    """
    if spec.moe is None:
        return {}
    return {
        "num_moe_experts": spec.moe.num_experts,
        "moe_ffn_hidden_size": spec.intermediate_size,
        "moe_router_topk": spec.moe.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not spec.moe.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": _use_transformer_engine(),
    }


def _virtual_pipeline_fields(layout: ParallelLayout) -> dict[str, Any]:
    """With two stages, next and previous are one peer, and batched sends and receives pair up in the wrong order."""
    if layout.vpp is None:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _use_transformer_engine() -> bool:
    return HAVE_TE and torch.cuda.is_available()


def build_chunks(
    spec: ModelSpec,
    layout: ParallelLayout,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    has_value_head: bool,
    device: torch.device,
) -> list[ModelChunk]:
    """This rank's chunks, one per virtual stage, with uninitialised weights. Called by all ranks of the role."""
    if torch.cuda.is_available() and not HAVE_TE and torch.distributed.get_rank() == 0:
        logger.warning("transformer-engine cannot be imported: Megatron's slower local layers are used; see mrl doctor")
    chunks = []
    experts = layout.experts_of(spec.moe.num_experts, groups.ep.rank()) if spec.moe else range(0)
    for vp_stage in range(layout.vpp) if layout.vpp else [None]:
        bare = _build_gpt(spec, layout, config, groups, vp_stage, has_value_head=has_value_head).to(device)
        layers = layout.layers_of(spec.num_hidden_layers, groups.pp.rank(), vp_stage)
        _check_layer_numbers(bare, layers)
        module = Float16Module(config, bare) if config.bf16 else bare
        chunks.append(ModelChunk(bare, module, layers, experts))
    return chunks


def _build_gpt(
    spec: ModelSpec,
    layout: ParallelLayout,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
    *,
    has_value_head: bool,
) -> GPTModel:
    pp_rank, last_vp_stage = groups.pp.rank(), (layout.vpp or 1) - 1
    num_layers = len(layout.layers_of(spec.num_hidden_layers, pp_rank, vp_stage))
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(spec, num_layers),
        vocab_size=padded_vocab_size(spec.vocab_size, layout.tp),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=pp_rank == 0 and not vp_stage,
        post_process=pp_rank == layout.pp - 1 and (vp_stage or 0) == last_vp_stage,
        share_embeddings_and_output_weights=spec.tie_word_embeddings and not has_value_head,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        vp_stage=vp_stage,
        pg_collection=groups,
    )
    if spec.rope_scaling:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, spec.rope_scaling)
    if not _use_transformer_engine():
        model.rotary_pos_emb = PackedRotary(model.rotary_pos_emb)
    if has_value_head and model.post_process:
        model.output_layer = ValueHead(config, groups.tp)
    return model


def _block_spec(spec: ModelSpec, num_layers: int) -> TransformerBlockSubmodules:
    num_experts = spec.moe.num_experts if spec.moe else None
    if _use_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=spec.moe is not None, qk_layernorm=spec.qk_layernorm
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    submodules = get_gpt_layer_local_submodules(
        num_experts=num_experts, normalization="RMSNorm", qk_layernorm=spec.qk_layernorm
    )
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    if spec.moe:
        # Transformer-engine has no linear layer to fuse this norm with; a checkpoint must name it in the same way.
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = submodules.self_attention.submodules
    attention.core_attention = SequenceAttention
    if spec.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _check_layer_numbers(model: GPTModel, layers: Sequence[int]) -> None:
    built = [layer.layer_number - 1 for layer in model.decoder.layers]
    assert built == list(layers), f"megatron built layers {built} where the layout has {list(layers)}"
