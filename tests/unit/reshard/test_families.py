"""The layout tables against hand-worked boxes and against cat, reshape and chunk; config fields that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from family_configs import FAMILY_CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import bitwise_equal, layouts, make_spec, moe_specs, padded, specs

from mrl.reshard.families import (
    expected_megatron_shape,
    expected_sglang_shape,
    families,
    megatron_pieces,
    padded_vocab_size,
    sglang_pieces,
    spec_from_config,
    tensor_shapes,
)
from mrl.reshard.layout import Piece, as_matrix
from mrl.reshard.reference import megatron_shard, sglang_shard
from mrl.reshard.spec import MixtureOfExperts, ModelSpec, RopeScaling
from mrl.reshard.synthetic import distinct_state

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}


def assemble(pieces, state, shape):
    """A local parameter from its boxes; rows that no box covers stay zero."""
    out = torch.zeros(shape, dtype=state["model.norm.weight"].dtype)
    flat = out.view(as_matrix(shape))
    for piece in pieces:
        source = state[piece.tensor]
        box = source.view(source.shape[0], -1)[piece.row :, piece.col :][: piece.rows, : piece.cols]
        flat[piece.local_row :, piece.local_col :][: piece.rows, : piece.cols] = box
    return out


def test_megatron_qkv_is_cut_through_a_query_group_when_ranks_outnumber_kv_heads():
    # 2 groups of [4 q heads, k, v] x 8 rows = 96 rows; rank 3 of 4 has rows 72 to 95: the last q head, k and v.
    spec = make_spec(hidden_size=64, num_key_value_heads=2, head_dim=8)
    prefix = "model.layers.1.self_attn."
    assert megatron_pieces(
        spec, "decoder.layers.1.self_attention.linear_qkv.weight", (24, 64), tp_rank=3, tp_size=4
    ) == [
        Piece(prefix + "q_proj.weight", 56, 0, 8, 64, 0, 0),
        Piece(prefix + "k_proj.weight", 8, 0, 8, 64, 8, 0),
        Piece(prefix + "v_proj.weight", 8, 0, 8, 64, 16, 0),
    ]


def test_sglang_replicates_kv_heads_on_consecutive_ranks():
    spec = make_spec(num_key_value_heads=2, head_dim=8)
    name = "model.layers.0.self_attn.qkv_proj.bias"
    k_rows = [sglang_pieces(spec, name, (32,), tp_rank=rank, tp_size=4)[1] for rank in range(4)]
    assert [(piece.row, piece.rows, piece.local_row) for piece in k_rows] == [
        (0, 8, 16),
        (0, 8, 16),
        (8, 8, 16),
        (8, 8, 16),
    ]


def test_padded_vocabulary_rows_are_in_no_piece():
    spec = make_spec(vocab_size=50)
    pieces = megatron_pieces(spec, "embedding.word_embeddings.weight", (16, 8), tp_rank=3, tp_size=4)
    assert pieces == [Piece("model.embed_tokens.weight", 48, 0, 2, 8, 0, 0)]
    assert sglang_pieces(spec, "lm_head.weight", (64, 8), tp_rank=1, tp_size=2) == []


def test_a_tied_output_layer_is_the_embedding_on_both_sides():
    spec = make_spec(tie_word_embeddings=True)
    megatron = megatron_pieces(spec, "output_layer.weight", (50, 8), tp_rank=0, tp_size=1)
    assert [piece.tensor for piece in megatron] == ["model.embed_tokens.weight"]
    assert sglang_pieces(spec, "lm_head.weight", (50, 8), tp_rank=0, tp_size=1) == megatron
    assert "lm_head.weight" not in tensor_shapes(spec)


@pytest.mark.parametrize(
    ("fused", "plain"),
    [("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm")],
)
def test_transformer_engine_norms_are_the_plain_norms(fused, plain):
    spec = make_spec()
    assert megatron_pieces(
        spec, f"decoder.layers.2.{fused}.layer_norm_weight", (8,), tp_rank=0, tp_size=2
    ) == megatron_pieces(spec, f"decoder.layers.2.{plain}.weight", (8,), tp_rank=1, tp_size=2)


@settings(max_examples=25, deadline=None)
@given(spec=specs | moe_specs, layout=layouts(), multiple=st.sampled_from([1, 8]), etp_size=st.sampled_from([1, 2, 4]))
def test_megatron_tables_agree_with_the_slow_reference(spec, layout, multiple, etp_size):
    state = distinct_state(spec, torch.float32)
    rows = padded(spec.vocab_size, multiple * layout.tp)
    for tp_rank in range(layout.tp):
        place = {"tp_rank": tp_rank, "tp_size": layout.tp, "etp_rank": (tp_rank + 1) % etp_size, "etp_size": etp_size}
        shard = megatron_shard(
            state,
            spec,
            **place,
            layers=range(spec.num_hidden_layers),
            pre_process=True,
            post_process=True,
            padded_vocab_size=rows,
            experts=range(spec.moe.num_experts) if spec.moe else (),
        )
        for name, tensor in shard.items():
            sizes = {"tp_size": layout.tp, "etp_size": etp_size, "padded_vocab_size": rows}
            assert expected_megatron_shape(spec, name, **sizes) == tensor.shape
            pieces = megatron_pieces(spec, name, tensor.shape, **place)
            assert bitwise_equal(assemble(pieces, state, tensor.shape), tensor), name


@settings(max_examples=25, deadline=None)
@given(spec=specs | moe_specs, tp_size=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_sglang_tables_agree_with_the_slow_reference(spec, tp_size, data):
    ep_size = data.draw(st.sampled_from([size for size in (1, 2, 4) if tp_size % size == 0])) if spec.moe else 1
    state = distinct_state(spec, torch.bfloat16)
    for tp_rank in range(tp_size):
        rows, place = padded(spec.vocab_size, 64), {"tp_rank": tp_rank, "tp_size": tp_size, "ep_size": ep_size}
        shard = sglang_shard(state, spec, padded_vocab_size=rows, **place)
        for name, tensor in shard.items():
            assert expected_sglang_shape(spec, name, tp_size=tp_size, ep_size=ep_size) == tensor.shape
            pieces = sglang_pieces(spec, name, tensor.shape, **place)
            assert bitwise_equal(assemble(pieces, state, tensor.shape), tensor), name


@pytest.mark.parametrize(("size", "tp", "padded"), [(250, 2, 250), (250, 4, 252), (1, 8, 8)])
def test_an_actors_vocabulary_is_padded_to_a_multiple_of_its_tp_group(size, tp, padded):
    assert padded_vocab_size(size, tp) == padded


def test_an_engines_vocabulary_is_padded_to_64_and_where_that_cannot_be_shared_further():
    spec = replace(spec_from_config(FAMILY_CONFIGS["qwen2"]), vocab_size=250)
    rows = {tp: tp * expected_sglang_shape(spec, "model.embed_tokens.weight", tp_size=tp)[0] for tp in (1, 2, 3)}
    assert rows == {1: 256, 2: 256, 3: 384}


def test_numbered_experts_of_transformer_engine_are_those_of_the_local_layers():
    spec = spec_from_config(FAMILY_CONFIGS["mixtral"])
    place = {"tp_rank": 1, "tp_size": 2}
    for matrix, shape in (("linear_fc1", (128, 64)), ("linear_fc2", (64, 64))):
        numbered = megatron_pieces(spec, f"decoder.layers.1.mlp.experts.{matrix}.weight3", shape, **place)
        local = f"decoder.layers.1.mlp.experts.local_experts.3.{matrix}.weight"
        assert numbered == megatron_pieces(spec, local, shape, **place)
    # [gate of expert 3; up of expert 3], whole on every tensor-parallel rank.
    name = "decoder.layers.1.mlp.experts.linear_fc1.weight3"
    assert megatron_pieces(spec, name, (128, 64), **place) == [
        Piece("model.layers.1.block_sparse_moe.experts.3.w1.weight", 0, 0, 64, 64, 0, 0),
        Piece("model.layers.1.block_sparse_moe.experts.3.w3.weight", 0, 0, 64, 64, 64, 0),
    ]


def test_megatron_cuts_an_expert_over_the_ranks_that_share_it():
    # Second half of 64 rows and columns, whichever tensor-parallel rank it is.
    spec = spec_from_config(FAMILY_CONFIGS["mixtral"])
    place, expert = {"tp_rank": 2, "tp_size": 4, "etp_rank": 1, "etp_size": 2}, "decoder.layers.0.mlp.experts."
    stem = "model.layers.0.block_sparse_moe.experts.2"
    assert megatron_pieces(spec, f"{expert}linear_fc1.weight2", (64, 64), **place) == [
        Piece(f"{stem}.w1.weight", 32, 0, 32, 64, 0, 0),
        Piece(f"{stem}.w3.weight", 32, 0, 32, 64, 32, 0),
    ]
    assert megatron_pieces(spec, f"{expert}linear_fc2.weight2", (64, 32), **place) == [
        Piece(f"{stem}.w2.weight", 0, 32, 64, 32, 0, 0)
    ]
    with pytest.raises(ValueError, match="expert = 64 is not divisible by the Megatron expert tensor parallel size 3"):
        megatron_pieces(spec, f"{expert}linear_fc2.weight2", (64, 21), tp_rank=0, tp_size=1, etp_size=3)


def test_sglang_experts_are_dealt_out_to_groups_of_ranks_and_cut_within():
    # 4 experts of 64 columns at TP4 x EP2: ranks 2 and 3 have experts 2 and 3, rank 3 the second half of each.
    spec = spec_from_config(FAMILY_CONFIGS["mixtral"])
    name = "model.layers.0.block_sparse_moe.experts.w2_weight"
    assert sglang_pieces(spec, name, (2, 64, 32), tp_rank=3, tp_size=4, ep_size=2) == [
        Piece("model.layers.0.block_sparse_moe.experts.2.w2.weight", 0, 32, 64, 32, 0, 0),
        Piece("model.layers.0.block_sparse_moe.experts.3.w2.weight", 0, 32, 64, 32, 64, 0),
    ]
    with pytest.raises(ValueError, match="expert parallel size 3 does not divide num_experts = 4"):
        sglang_pieces(spec, name, (2, 64, 32), tp_rank=0, tp_size=3, ep_size=3)


def test_heads_padded_by_the_engine_are_refused_with_the_remedy():
    # 8 q heads, 2 KV heads at TP4 on CPU: SGLang pads to 16 and 4, so a rank has 4 + 1 + 1 heads instead of 2 + 1 + 1.
    spec = make_spec(num_key_value_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"shape \(48, 8\).*\(32, 8\).*pads instead of replicating"):
        sglang_pieces(spec, "model.layers.0.self_attn.qkv_proj.weight", (48, 8), tp_rank=0, tp_size=4)


@pytest.mark.parametrize(
    ("name", "shape", "tp_size", "message"),
    [
        ("decoder.layers.4.input_layernorm.weight", (8,), 1, "names layer 4, but the model has 4 layers"),
        ("decoder.layers.0.mlp.router.weight", (8,), 1, "no place in a qwen2 checkpoint"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (8, 16), 3, "intermediate_size = 16 is not divisible"),
        ("embedding.word_embeddings.weight", (24, 8), 2, "holds 24 vocabulary rows on each of 2 ranks"),
        ("decoder.final_layernorm.weight", (9,), 1, r"has shape \(9,\)"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_by_name(name, shape, tp_size, message):
    with pytest.raises(ValueError, match=message):
        megatron_pieces(make_spec(), name, shape, tp_rank=0, tp_size=tp_size)


def test_a_bias_of_a_family_without_bias_is_refused():
    spec = make_spec(family="llama", attention_bias=False)
    with pytest.raises(ValueError, match=r"linear_qkv.bias has no place in a llama checkpoint"):
        megatron_pieces(spec, "decoder.layers.0.self_attention.linear_qkv.bias", (32,), tp_rank=0, tp_size=1)


def test_both_spellings_of_the_rope_settings_give_one_spec():
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    spec = spec_from_config(CONFIG)
    assert spec == spec_from_config(new)
    assert (spec.rope_theta, spec.head_dim, spec.attention_bias) == (1e6, 8, True)


def test_llama_has_no_bias_and_its_kv_heads_default_to_all():
    config = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "architectures")}
    spec = spec_from_config({**config, "model_type": "llama", "head_dim": 16})
    assert (spec.attention_bias, spec.num_key_value_heads, spec.head_dim) == (False, 8, 16)


@pytest.mark.parametrize(
    "field",
    [
        {"model_type": "gpt2"},
        {"architectures": ["Qwen2ForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
        {"rope_scaling": {**LLAMA3_ROPE, "factor": 0}},
        {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"quantization_config": {"quant_method": "fp8"}},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 3},
        {"hidden_size": 0},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_config_that_changes_the_mathematics_is_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        spec_from_config({**CONFIG, **field})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_bias_is_refused_where_it_biases_the_output_too(family):
    with pytest.raises(ValueError, match=f"{family} config has attention_bias = True"):
        spec_from_config({**FAMILY_CONFIGS[family], "attention_bias": True})


def test_every_family_has_a_test_config_and_nothing_else_has():
    assert FAMILY_CONFIGS.keys() == families().keys()
    assert all(spec_from_config(config).family == name for name, config in FAMILY_CONFIGS.items())


@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_a_spec_survives_json(config):
    spec = spec_from_config(config)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_llama_3_scaling_is_read_from_both_spellings():
    old = {**CONFIG, "model_type": "llama", "architectures": None, "rope_scaling": LLAMA3_ROPE}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 1e6}
    spec = spec_from_config(old)
    assert spec == spec_from_config(new)
    assert spec.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_qwen3_takes_its_own_head_dim_where_none_is_given():
    config = {key: value for key, value in FAMILY_CONFIGS["qwen3"].items() if key != "head_dim"}
    assert spec_from_config(config).head_dim == 128


@pytest.mark.parametrize("window", [{"sliding_window": 511}, {}], ids=["short", "absent"])
def test_mistral_with_a_sliding_window_is_refused(window):
    config = {key: value for key, value in FAMILY_CONFIGS["mistral"].items() if key != "sliding_window"}
    with pytest.raises(ValueError, match="mistral config has sliding_window = "):
        spec_from_config({**config, "max_position_embeddings": 32768 if not window else 512, **window})
    spec_from_config({**config, "sliding_window": 512})


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"use_sliding_window": True}),
        ("qwen3_moe", {"num_experts_per_tok": 9}),
        ("mixtral", {"sliding_window": 128}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("mixtral", {"head_dim": 16}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"tie_word_embeddings": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_mixture_of_experts_that_cannot_be_honoured_is_refused_by_name(family, field):
    name = next(iter(field)).removeprefix("num_local_")
    with pytest.raises(ValueError, match=name):
        spec_from_config({**FAMILY_CONFIGS[family], **field})


def test_mixtral_defaults_are_those_of_transformers():
    config = {
        key: value for key, value in FAMILY_CONFIGS["mixtral"].items() if key not in ("rope_theta", "rms_norm_eps")
    }
    spec = spec_from_config(config)
    assert (spec.rope_theta, spec.rms_norm_eps) == (1e6, 1e-5)
    assert spec.moe == MixtureOfExperts(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)


def test_a_sliding_window_that_no_layer_uses_is_accepted():
    spec_from_config({**CONFIG, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1})
    spec_from_config({**CONFIG, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2})
