"""Log-probs, losses, gradient norms and weights of every layout against transformers and torch.optim.AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hugging_face import checkpoint_state
from megatron_reference import (
    OPTIMIZER,
    TEMPERATURE,
    gather_hf_tensors,
    load_reference,
    make_batch,
    policy_loss,
    save_tiny_model,
)
from ranks import run_on_ranks

from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit

VOCAB = 250
PAIRS = MicroBatchLimit(samples=2)
# Samples have 6 to 24 tokens.
FEW_TOKENS = MicroBatchLimit(tokens=40)
FULL = Recompute(granularity="full")
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
OVERLAPPED = DataParallelSettings(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=60_000
)

# Log-probs of magnitude 6, losses of 1, gradient norms of 1: float32 rounding through 4 or 8 layers.
LOG_PROB_TOLERANCE = 1e-5
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 2e-5
# Two Adam steps move a weight by 1e-2; the layouts' and AdamW's weights differ by rounding of the gradients.
WEIGHT_TOLERANCE = 2e-5

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2 pp2 dp2": ("qwen2", {"tp": 2, "pp": 2}, {}),
    "tp4 pp1 dp2 sp": ("qwen2", {"tp": 4, "sequence_parallel": True}, {"data_parallel": DISTRIBUTED}),
    "tp1 pp4 vpp2 dp2": ("qwen2", {"pp": 4, "vpp": 2}, {}),
    "tp2 pp2 vpp2 dp2 sp overlap recompute": (
        "qwen2",
        {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
        {"data_parallel": OVERLAPPED, "recompute": FULL},
    ),
    "tied, kv heads < tp: tp4 pp2": (
        "llama",
        {"tp": 4, "pp": 2, "sequence_parallel": True},
        {"recompute": Recompute(granularity="selective")},
    ),
    "tied, by tokens: tp2 pp1 dp4": ("llama", {"tp": 2}, {"limit": FEW_TOKENS}),
    "packed: tp2 pp2 vpp2 dp2 sp overlap recompute": (
        "qwen2",
        {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
        {"packed": True, "data_parallel": OVERLAPPED, "recompute": FULL},
    ),
    "packed, by tokens: tp2 pp1 dp4": ("qwen2", {"tp": 2}, {"packed": True, "limit": FEW_TOKENS}),
    "packed, by tokens, tied, kv heads < tp: tp4 pp2 sp": (
        "llama",
        {"tp": 4, "pp": 2, "sequence_parallel": True},
        {"packed": True, "limit": FEW_TOKENS, "recompute": Recompute(granularity="selective")},
    ),
    "shared sequences, by tokens: tp2 cp2 pp2 sp": (
        "qwen2",
        {"tp": 2, "cp": 2, "pp": 2, "sequence_parallel": True},
        {"packed": True, "limit": FEW_TOKENS, "data_parallel": OVERLAPPED},
    ),
    "shared sequences, tied, norms on q and k, experts: cp4 ep2 dp2": (
        "qwen3_moe",
        {"cp": 4, "ep": 2},
        {"packed": True, "recompute": Recompute(granularity="selective")},
    ),
    "norms on q and k, kv heads < tp: tp4 dp2 sp": ("qwen3", {"tp": 4, "sequence_parallel": True}, {}),
    "experts: tp2 ep4 dp4 sp": ("qwen3_moe", {"tp": 2, "ep": 4, "sequence_parallel": True}, {}),
    "experts in parts: tp2 pp2 ep2 etp2 sp": (
        "qwen3_moe",
        {"tp": 2, "pp": 2, "ep": 2, "etp": 2, "sequence_parallel": True},
        {"data_parallel": OVERLAPPED},
    ),
    "experts in parts, packed, by tokens: ep2 etp4 dp8": (
        "mixtral",
        {"ep": 2, "etp": 4},
        {"packed": True, "limit": FEW_TOKENS, "recompute": FULL},
    ),
    "experts: pp2 vpp2 ep2 dp4 recompute": (
        "mixtral",
        {"pp": 2, "vpp": 2, "ep": 2},
        {"data_parallel": DISTRIBUTED, "recompute": FULL},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        # 250 rows: divisible by tp = 2, padded for tp = 4. The tied Llama's 2 KV heads are fewer than tp = 4.
        "qwen2": save_tiny_model(folder / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4, layers=8, sharded=True),
        "llama": save_tiny_model(folder / "llama", "llama", vocab_size=VOCAB, kv_heads=2, tied=True),
        "qwen3_moe": save_tiny_model(folder / "qwen3_moe", "qwen3_moe", vocab_size=VOCAB, kv_heads=2),
        "mixtral": save_tiny_model(folder / "mixtral", "mixtral", vocab_size=VOCAB, kv_heads=2),
        "qwen3": save_tiny_model(folder / "qwen3", "qwen3", vocab_size=VOCAB, kv_heads=2),
    }


def mini_batches() -> list:
    # 7 samples: not a multiple of any data-parallel size times micro-batch size.
    return [make_batch(VOCAB, 7, seed=seed) for seed in range(2)]


def run_reference(path: str) -> tuple[Any, ...]:
    reference = load_reference(path)
    with torch.no_grad():
        log_probs = reference.outputs(mini_batches()[0])["log_probs"]
    log = reference.train(mini_batches(), policy_loss)
    return log_probs, log, checkpoint_state(reference.model)


def run_case(path: str, layout: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    options = dict(options)
    limit = options.pop("limit", PAIRS)
    spec = load_spec(path)
    engine = build_engine(
        RoleSetup(
            kind="actor",
            model_path=path,
            spec=spec,
            layout=ParallelLayout(world_size=dist.get_world_size(), **layout),
            temperature=TEMPERATURE,
            optimizer=OPTIMIZER,
            **options,
        )
    )
    log_probs = engine.compute_log_probs(mini_batches()[0], limit=limit)
    first = engine.export_weights()
    log = [engine.update(batch, policy_loss(batch), limit=limit, with_entropy=True) for batch in mini_batches()]
    assert engine.export_weights() == first
    weights = gather_hf_tensors(engine, spec)
    engine.close()
    return log_probs, log, weights


def check_against(reference: tuple[Any, ...], result: tuple[Any, ...], case: str) -> None:
    (ref_log_probs, ref_log, ref_weights), (log_probs, log, weights) = reference, result
    torch.testing.assert_close(log_probs, ref_log_probs, atol=LOG_PROB_TOLERANCE, rtol=0, msg=lambda m: f"{case}: {m}")
    for step, (ours, theirs) in enumerate(zip(log, ref_log, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            tolerance = LOSS_TOLERANCE if name in ("loss", "lr") else NORM_TOLERANCE
            assert ours[name] == pytest.approx(expected, rel=tolerance, abs=tolerance), (case, step, name)
    for name, tensor in weights.items():
        difference = (tensor - ref_weights[name]).abs().max().item()
        assert difference <= WEIGHT_TOLERANCE, (case, name, difference)


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    # Forked like the ranks: the test process must not start autograd threads before it forks again.
    return run_on_ranks(lambda: {family: run_reference(path) for family, path in models.items()}, 1)[0]


def test_one_rank_trains_like_transformers(models, references) -> None:
    for family in ("qwen2", "llama", "mixtral"):
        result = run_on_ranks(lambda path=models[family]: run_case(path, {}, {}), 1)[0]
        check_against(references[family], result, f"{family} on one rank")


def test_every_layout_trains_like_transformers(models, references) -> None:
    def run_all() -> list[tuple[Any, ...]]:
        return [run_case(models[family], layout, options) for family, layout, options in CASES.values()]

    by_rank = run_on_ranks(run_all, 8, timeout_s=280)
    for number, (case, (family, _, _)) in enumerate(CASES.items()):
        check_against(references[family], by_rank[0][number], case)
        for results in by_rank[1:]:
            torch.testing.assert_close(results[number][0], by_rank[0][number][0], atol=0, rtol=0)
            assert results[number][1] == by_rank[0][number][1], case
