"""A reshard against SGLang's own models and weight loaders, bitwise, over layouts and families."""

import json

import pytest
import torch
from family_configs import FAMILY_CONFIGS

from mrl.backends.sglang.preload import preload_sglang
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.check import differing_parameters, main, run_check, training_layout
from mrl.reshard.families import spec_from_config
from mrl.reshard.synthetic import distinct_state

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
MOE_FAMILIES = ["qwen3_moe", "mixtral"]
LAYOUT_PAIRS = [
    ("tp=1", 8),
    ("tp=2,pp=2,dp=2", 4),
    ("tp=2,pp=2,vpp=2", 1),
    ("tp=4", 2),
    ("pp=4", 2),
    ("pp=2,vpp=2", 8),
    ("tp=4,pp=4", 8),
]


@pytest.fixture(autouse=True, scope="module")
def _sglang():
    preload_sglang()


def check_every_layout_pair(config):
    for train, rollout_tp in LAYOUT_PAIRS:
        report = run_check(config, training_layout(train), rollout_tp=rollout_tp, dtype="bfloat16")
        assert len(report.ranks) == rollout_tp
        assert [rank.differing for rank in report.ranks] == [()] * rollout_tp, (train, rollout_tp)
        assert sum(rank.plan.stats.fills for rank in report.ranks) == (1 if config["tie_word_embeddings"] else 2)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_parameter_of_every_family_is_what_sglang_loads_from_the_checkpoint(family):
    check_every_layout_pair(FAMILY_CONFIGS[family])


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ties_and_numbers_of_kv_heads(tied, kv_heads):
    check_every_layout_pair({**CONFIG, "tie_word_embeddings": tied, "num_key_value_heads": kv_heads})


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_are_dealt_out_on_either_side(family):
    pairs = [("dp=2,ep=2", 2, 2), ("tp=2,ep=2", 4, 2), ("tp=2,dp=2,ep=4", 2, 1), ("tp=2,pp=2", 4, 4), ("dp=4", 4, 2)]
    pairs += [("tp=2,etp=2", 4, 1), ("tp=2,dp=2,ep=2,etp=2", 4, 2), ("pp=2,dp=4,etp=4", 2, 1)]
    for train, rollout_tp, rollout_ep in pairs:
        report = run_check(FAMILY_CONFIGS[family], training_layout(train), rollout_tp=rollout_tp, rollout_ep=rollout_ep)
        assert [rank.differing for rank in report.ranks] == [()] * rollout_tp, (train, rollout_tp, rollout_ep)


def test_experts_in_an_order_of_their_own_are_refused():
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    from mrl.backends.sglang.experts import expert_parallel_size
    from mrl.backends.sglang.reference_loader import build_engine_model

    dense = build_engine_model(CONFIG, tp_rank=0, tp_size=1, dtype=torch.bfloat16)
    assert expert_parallel_size(dense) == 1
    config = FAMILY_CONFIGS["mixtral"]
    model = build_engine_model(config, tp_rank=1, tp_size=4, ep_size=2, dtype=torch.bfloat16)
    assert expert_parallel_size(model) == 2
    runner = model.model.layers[2].block_sparse_moe.experts.quant_method.runner
    runner.runner_backend = MoeRunnerBackend.FLASHINFER_CUTLASS
    with pytest.raises(ValueError, match=r"layers\.2.*flashinfer_cutlass.* set .*moe_runner_backend to triton"):
        expert_parallel_size(model)


@pytest.mark.parametrize(
    ("vocab_size", "vocab_multiple", "megatron_rows", "sglang_rows"),
    [(512, 1, 512, 512), (500, 1, 500, 512), (500, 128, 512, 512), (577, 256, 1024, 640), (640, 192, 768, 640)],
    ids=["neither", "engine", "both", "trainer more", "trainer only"],
)
def test_vocabulary_padding_on_either_side(vocab_size, vocab_multiple, megatron_rows, sglang_rows):
    layout = ParallelLayout(world_size=2, tp=2)
    config = {**CONFIG, "vocab_size": vocab_size}
    report = run_check(config, layout, rollout_tp=4, dtype="float32", vocab_multiple=vocab_multiple)
    targets = [target for rank in report.ranks for target in rank.plan.targets]
    assert report.padded_vocab_size == megatron_rows
    assert sum(target.rows for target in targets if target.name == "lm_head.weight") == sglang_rows
    assert report.ok


def test_a_parameter_that_differs_in_one_bit_is_found():
    # Imported here: at the top it would import SGLang before it is told that this is a CPU.
    from mrl.backends.sglang.reference_loader import build_engine_model, load_reference

    state = distinct_state(spec_from_config(CONFIG), torch.bfloat16)
    models = [build_engine_model(CONFIG, tp_rank=1, tp_size=2, dtype=torch.bfloat16) for _ in range(2)]
    for model in models:
        load_reference(model, state, tp_rank=1, tp_size=2)
    assert differing_parameters(*models) == ()
    name = "model.layers.2.mlp.gate_up_proj.weight"
    models[0].get_parameter(name).data.view(torch.int16)[5, 7] ^= 1
    assert differing_parameters(*models) == (name,)


def test_a_fresh_engine_model_is_poisoned_everywhere():
    from mrl.backends.sglang.reference_loader import build_engine_model

    model = build_engine_model(CONFIG, tp_rank=0, tp_size=1, dtype=torch.float32)
    assert all(bool(param.isnan().all()) for param in model.parameters())


def test_the_command_prints_its_plan_and_exits_with_0(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["--model", str(tmp_path), "--train", "tp=2,pp=2,vpp=2", "--rollout", "tp=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "TP2 x PP2 x VPP2" in printed
    assert "every parameter is bitwise equal" in printed
