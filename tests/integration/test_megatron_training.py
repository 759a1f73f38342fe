"""Log-probs, losses, gradient norms and weights of every layout against transformers and torch.optim.AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_cases import check_against, run_case, run_reference
from megatron_reference import load_reference, make_batch, save_tiny_model
from ranks import run_on_ranks

from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.types import MicroBatchLimit

VOCAB = 250
# 7 samples: not a multiple of any data-parallel size times micro-batch size.
BATCHES = [make_batch(VOCAB, 7, seed=seed) for seed in range(2)]
# Samples have 6 to 24 tokens.
FEW_TOKENS = MicroBatchLimit(tokens=40)
FULL = Recompute(granularity="full")
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
OVERLAPPED = DataParallelSettings(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=60_000
)

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


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    # Forked like the ranks: the test process must not start autograd threads before it forks again.
    return run_on_ranks(
        lambda: {family: run_reference(load_reference(path), BATCHES) for family, path in models.items()}, 1
    )[0]


def test_one_rank_trains_like_transformers(models, references) -> None:
    for family in ("qwen2", "llama", "mixtral"):
        result = run_on_ranks(lambda path=models[family]: run_case(path, BATCHES, {}, {}), 1)[0]
        check_against(references[family], result, f"{family} on one rank")


def test_every_layout_trains_like_transformers(models, references) -> None:
    def run_all() -> list[tuple[Any, ...]]:
        return [run_case(models[family], BATCHES, layout, options) for family, layout, options in CASES.values()]

    by_rank = run_on_ranks(run_all, 8, timeout_s=280)
    for number, (case, (family, _, _)) in enumerate(CASES.items()):
        check_against(references[family], by_rank[0][number], case)
        for results in by_rank[1:]:
            torch.testing.assert_close(results[number][0], by_rank[0][number][0], atol=0, rtol=0)
            assert results[number][1] == by_rank[0][number][1], case
