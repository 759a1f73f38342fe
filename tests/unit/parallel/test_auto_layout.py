"""Choosing and checking layouts, with published model shapes and memory worked out by hand."""

from typing import Any

import pytest

from mrl.parallel.auto_layout import BytesPerParameter, check_layout, choose_layout, rank_bytes
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import count_params
from mrl.reshard.spec import MixtureOfExperts, ModelSpec

GIB = 2**30


def make_spec(**fields: Any) -> ModelSpec:
    settings = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": False}
    return ModelSpec(**{"family": "llama", "attention_bias": False, **settings, **fields})


LLAMA_8B = make_spec(
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
)
MIXTRAL = make_spec(
    family="mixtral",
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=32000,
    moe=MixtureOfExperts(num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
)
TRAINED_BF16 = BytesPerParameter.of(weight=2, trained=True)
SMALL = make_spec(
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
)


def test_parameter_counts_equal_the_published_ones() -> None:
    assert count_params(LLAMA_8B) == 8_030_261_248
    qwen2_0_5b = make_spec(
        family="qwen2",
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        hidden_size=896,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    assert count_params(qwen2_0_5b) == 494_032_768
    assert count_params(MIXTRAL) == 46_702_792_704


def test_bytes_per_parameter_of_the_usual_settings() -> None:
    # bf16: weight 2, gradient 4, main copy 4 and moments 8; fp32 needs no main copy.
    assert TRAINED_BF16.total(dp=1) == 18
    assert TRAINED_BF16.total(dp=4) == 6 + 12 / 4
    assert BytesPerParameter.of(weight=4, trained=True, distributed_optimizer=False).total(dp=4) == 16
    assert BytesPerParameter.of(weight=2, trained=False).total(dp=8) == 2


def test_fullest_stage_holds_one_vocabulary_matrix_when_pipelined() -> None:
    layer_params = count_params(LLAMA_8B) - 2 * 128256 * 4096
    layout = ParallelLayout(world_size=8, tp=2, pp=4)
    expected = (layer_params / 4 + 128256 * 4096) / 2 * 18
    assert rank_bytes(layout, LLAMA_8B, TRAINED_BF16) == round(expected)
    alone = ParallelLayout(world_size=1)
    assert rank_bytes(alone, LLAMA_8B, BytesPerParameter.of(weight=2, trained=False)) == 2 * count_params(LLAMA_8B)


@pytest.mark.parametrize(
    ("memory_gib", "expected"),
    [
        # 8.03e9 parameters x (6 + 12 / dp) bytes / (tp x pp): 7.5, 9, 12 and 18 bytes for dp 8, 4, 2 and 1.
        (57, "TP1 x PP1 x DP8"),  # 56.1 GiB
        (56, "TP2 x PP1 x DP4 + SP"),  # 33.7 GiB
        (33, "TP4 x PP1 x DP2 + SP"),  # 22.4 GiB
        (22, "TP8 x PP1 x DP1 + SP"),  # 16.8 GiB
    ],
)
def test_smallest_layout_that_fits_is_chosen(memory_gib: int, expected: str) -> None:
    layout = choose_layout(
        LLAMA_8B,
        world_size=8,
        gpus_per_node=8,
        memory_bytes_per_rank=memory_gib * GIB,
        bytes_per_parameter=TRAINED_BF16,
    )
    assert str(layout) == expected


def test_pipeline_is_used_where_a_node_or_the_heads_end() -> None:
    weights = BytesPerParameter.of(weight=2, trained=False)
    across = choose_layout(
        LLAMA_8B, world_size=16, gpus_per_node=2, memory_bytes_per_rank=5 * GIB, bytes_per_parameter=weights
    )
    assert (across.tp, across.pp) == (2, 2)
    small_bytes = rank_bytes(ParallelLayout(world_size=8, tp=4, pp=2), SMALL, weights)
    few_heads = choose_layout(
        SMALL, world_size=8, gpus_per_node=8, memory_bytes_per_rank=small_bytes, bytes_per_parameter=weights
    )
    assert (few_heads.tp, few_heads.pp) == (4, 2)


def test_no_smaller_replica_would_have_fitted() -> None:
    memory = 12 * GIB
    arguments = {"world_size": 64, "gpus_per_node": 8, "bytes_per_parameter": TRAINED_BF16}
    chosen = choose_layout(LLAMA_8B, memory_bytes_per_rank=memory, **arguments)
    assert rank_bytes(chosen, LLAMA_8B, TRAINED_BF16) <= memory
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            if tp * pp < chosen.tp * chosen.pp:
                assert rank_bytes(ParallelLayout(world_size=64, tp=tp, pp=pp), LLAMA_8B, TRAINED_BF16) > memory


def test_nothing_fits_names_the_leanest_layout_and_its_need() -> None:
    with pytest.raises(ValueError, match=r"8\.03 billion parameters over 2 ranks fits 40\.00 GiB .* TP2 x PP1 x DP1"):
        choose_layout(
            LLAMA_8B,
            world_size=2,
            gpus_per_node=8,
            memory_bytes_per_rank=40 * GIB,
            bytes_per_parameter=TRAINED_BF16,
        )


def test_layouts_that_fit_the_model_pass_with_more_ranks_than_kv_heads_too() -> None:
    for tp, pp, vpp in ((1, 1, None), (2, 3, None), (4, 1, None), (2, 3, 2)):
        check_layout(ParallelLayout(world_size=tp * pp, tp=tp, pp=pp, vpp=vpp), SMALL)


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "message"),
    [
        (8, 1, None, r"tensor_model_parallel_size = 8 .* num_attention_heads = 4, .* choose one of 1, 2, 4$"),
        (3, 1, None, r"tensor_model_parallel_size = 3"),
        (
            1,
            4,
            None,
            r"pipeline_model_parallel_size = 4 does not divide num_hidden_layers = 6; .* 1, 2, 3, 6$",
        ),
        (1, 2, 2, r"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = 4 does not divide"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(tp: int, pp: int, vpp: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(ParallelLayout(world_size=tp * pp, tp=tp, pp=pp, vpp=vpp), SMALL)


def test_experts_are_split_by_their_own_axis_only() -> None:
    experts = 32 * 8 * 3 * 4096 * 14336
    others = count_params(MIXTRAL) - experts
    weights = BytesPerParameter.of(weight=2, trained=False)
    for tp, ep in ((1, 1), (1, 4), (4, 2), (2, 8)):
        layout = ParallelLayout(world_size=8, tp=tp, ep=ep, sequence_parallel=True)
        assert rank_bytes(layout, MIXTRAL, weights) == round(2 * (others / tp + experts / ep))
    # Adam's 12 bytes of an expert's parameter are sharded over the 2 ranks that hold it, of another's over dp = 4.
    layout = ParallelLayout(world_size=8, tp=2, ep=4, sequence_parallel=True)
    assert rank_bytes(layout, MIXTRAL, TRAINED_BF16) == round(others / 2 * (6 + 12 / 4) + experts / 4 * (6 + 12 / 2))
    # Cut in two, there are two replicas left over ep = 2, and one over ep = 4.
    for ep, replicas in ((2, 2), (4, 1)):
        layout = ParallelLayout(world_size=8, tp=2, ep=ep, etp=2, sequence_parallel=True)
        in_experts = experts / (2 * ep) * (6 + 12 / replicas)
        assert rank_bytes(layout, MIXTRAL, TRAINED_BF16) == round(others / 2 * (6 + 12 / 4) + in_experts)


def test_expert_parallel_ranks_are_consecutive_in_a_stage() -> None:
    layout = ParallelLayout(world_size=16, tp=2, pp=2, ep=4)
    assert [layout.ep_rank(rank) for rank in range(16)] == [0, 1, 2, 3] * 4
    assert [list(layout.experts_of(8, rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert str(layout) == "TP2 x PP2 x EP4 x DP4"
    with pytest.raises(ValueError, match="expert_model_parallel_size = 3 does not divide the 4 ranks of a pipeline"):
        ParallelLayout(world_size=8, pp=2, ep=3)


def test_ranks_that_share_an_expert_are_consecutive_and_count_before_those_that_deal_them_out() -> None:
    layout = ParallelLayout(world_size=16, tp=4, pp=2, ep=2, etp=2)
    assert [layout.etp_rank(rank) for rank in range(16)] == [0, 1] * 8
    assert [layout.ep_rank(rank) for rank in range(16)] == [0, 0, 1, 1] * 4
    assert layout.expert_dp == 2
    assert str(layout) == "TP4 x PP2 x EP2 x ETP2 x DP2"
    with pytest.raises(
        ValueError,
        match="expert_tensor_parallel_size x expert_model_parallel_size = 8 does not divide the 4 ranks of a pipeline",
    ):
        ParallelLayout(world_size=8, pp=2, ep=2, etp=4)


@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        (SMALL, {"etp": 2}, "expert_tensor_parallel_size = 2, but llama models have no experts; set it to 1"),
        (MIXTRAL, {"world_size": 6, "etp": 3}, "= 3 does not divide the experts' intermediate size 14336; choose a"),
        (SMALL, {"ep": 2}, "expert_model_parallel_size = 2, but llama models have no experts"),
        (MIXTRAL, {"ep": 16}, r"= 16 does not divide num_experts = 8; make it one of 1, 2, 4, 8$"),
        (MIXTRAL, {"tp": 2}, "needs sequence_parallel = true"),
    ],
)
def test_layouts_that_do_not_fit_the_experts_are_refused(spec: ModelSpec, layout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(ParallelLayout(**{"world_size": 16, **layout}), spec)


def test_the_automatic_layout_keeps_the_expert_parallel_size() -> None:
    sizes = {"world_size": 8, "gpus_per_node": 8, "bytes_per_parameter": BytesPerParameter.of(weight=2, trained=False)}
    chosen = choose_layout(MIXTRAL, memory_bytes_per_rank=16 * GIB, ep=8, **sizes)
    assert str(chosen) == "TP1 x PP1 x EP8 x DP8"
    with pytest.raises(ValueError, match="no layout of 8 ranks has expert_model_parallel_size = 3"):
        choose_layout(MIXTRAL, memory_bytes_per_rank=16 * GIB, ep=3, **sizes)
    cut = choose_layout(MIXTRAL, memory_bytes_per_rank=16 * GIB, ep=4, etp=2, **sizes)
    assert str(cut) == "TP1 x PP1 x EP4 x ETP2 x DP8"
    with pytest.raises(ValueError, match="= 4 and expert_tensor_parallel_size = 3; choose a divisor"):
        choose_layout(MIXTRAL, memory_bytes_per_rank=16 * GIB, ep=4, etp=3, **sizes)
