"""transformer-engine's layers against transformers: log-probs, updates, weights; every family, one GPU and two."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from family_configs import FAMILY_CONFIGS
from hugging_face import checkpoint_state
from megatron_reference import OPTIMIZER, TEMPERATURE, load_reference, make_batch, policy_loss, save_random_model
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="transformer-engine is not installed")

VOCAB = 500
FEW_TOKENS = MicroBatchLimit(tokens=40)
OVERLAPPED = DataParallelSettings(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
DENSE = ("llama", "qwen2", "qwen3", "mistral")
EXPERTS = ("qwen3_moe", "mixtral")

# Float32 through other kernels: log-probs of magnitude 6, gradient norms of 1, two Adam steps of up to 3e-3.
LOG_PROB_TOLERANCE = 5e-5
METRIC_TOLERANCE = 2e-4
WEIGHT_TOLERANCE = 2e-4
# Bfloat16 through four layers.
BF16_MEAN_TOLERANCE = 0.03

ON_ONE: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packed": True, "limit": FEW_TOKENS},
    "packed, distributed optimizer, full recompute": {
        "packed": True,
        "data_parallel": DISTRIBUTED,
        "recompute": Recompute(granularity="full"),
    },
}
ON_TWO: dict[str, dict[str, Any]] = {
    "tp2 sp": {"layout": {"tp": 2, "sequence_parallel": True}},
    "tp2 sp packed": {"layout": {"tp": 2, "sequence_parallel": True}, "packed": True, "limit": FEW_TOKENS},
    "pp2 packed": {"layout": {"pp": 2}, "packed": True},
    "pp2 vpp2 packed": {"layout": {"pp": 2, "vpp": 2}, "packed": True, "data_parallel": OVERLAPPED},
    "dp2 packed": {"packed": True, "limit": FEW_TOKENS, "data_parallel": OVERLAPPED},
}
ON_TWO_EXPERTS: dict[str, dict[str, Any]] = {"ep2 packed": {"layout": {"ep": 2}, "packed": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("families")

    def save_all() -> dict[str, str]:
        return {name: save_random_model(folder / name, config) for name, config in FAMILY_CONFIGS.items()}

    # Forked: transformers asks the GPU what it can do, and CUDA must not start in the process that ranks come from.
    return run_on_ranks(save_all, 1)[0]


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    return run_on_ranks(lambda: {name: train_reference(path) for name, path in models.items()}, 1)[0]


def mini_batches() -> list:
    return [make_batch(VOCAB, 7, seed=seed) for seed in range(2)]


def train_reference(path: str) -> tuple[Any, ...]:
    reference = load_reference(path)
    with torch.no_grad():
        log_probs = reference.outputs(mini_batches()[0])["log_probs"]
    log = reference.train(mini_batches(), policy_loss)
    return log_probs, log, checkpoint_state(reference.model)


def build(path: str, *, dtype: str = "float32", layout: dict[str, Any] | None = None, **options: Any) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind="actor",
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=dist.get_world_size(), **(layout or {})),
            temperature=TEMPERATURE,
            optimizer=OPTIMIZER,
            device="cuda",
            dtype=dtype,
            **options,
        )
    )


def train(path: str, options: dict[str, Any]) -> tuple[Any, ...]:
    options = dict(options)
    limit = options.pop("limit", MicroBatchLimit(samples=2))
    engine = build(path, **options)
    log_probs = engine.compute_log_probs(mini_batches()[0], limit=limit)
    log = [engine.update(batch, policy_loss(batch), limit=limit, with_entropy=True) for batch in mini_batches()]
    weights = written_weights(engine)
    engine.close()
    return log_probs, log, weights


def written_weights(engine: MegatronEngine) -> dict[str, Tensor]:
    """Rank 0's view of the Hugging Face folder that all ranks write; empty elsewhere."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    export = engine.stage_hugging_face(folder, in_background=False)
    export.write()
    export.finish()
    dist.barrier()
    if dist.get_rank():
        return {}
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_against(reference: tuple[Any, ...], result: tuple[Any, ...], case: str) -> None:
    (ref_log_probs, ref_log, ref_weights), (log_probs, log, weights) = reference, result
    torch.testing.assert_close(log_probs, ref_log_probs, atol=LOG_PROB_TOLERANCE, rtol=0, msg=lambda m: f"{case}: {m}")
    for step, (ours, theirs) in enumerate(zip(log, ref_log, strict=True)):
        for name, expected in theirs.items():
            assert ours[name] == pytest.approx(expected, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), (case, step, name)
    assert weights.keys() == ref_weights.keys(), case
    for name, tensor in weights.items():
        difference = (tensor - ref_weights[name]).abs().max().item()
        assert difference <= WEIGHT_TOLERANCE, (case, name, difference)


def train_all(models: dict[str, str], cases: dict[str, dict[str, Any]], families: tuple[str, ...]) -> dict[str, Any]:
    return {f"{family}, {case}": train(models[family], cases[case]) for family in families for case in cases}


def check_all(references: dict[str, tuple[Any, ...]], results: dict[str, Any]) -> None:
    assert results
    for case, result in results.items():
        check_against(references[case.split(", ")[0]], result, case)


def test_one_gpu_trains_like_transformers(models, references) -> None:
    families = (*DENSE, *EXPERTS)
    check_all(references, run_on_ranks(lambda: train_all(models, ON_ONE, families), 1, on_gpus=True)[0])


@pytest.mark.gpus(2)
def test_two_gpus_train_like_transformers(models, references) -> None:
    def run() -> dict[str, Any]:
        return train_all(models, ON_TWO, ("qwen2", "qwen3")) | train_all(models, ON_TWO_EXPERTS, EXPERTS)

    check_all(references, run_on_ranks(run, 2, on_gpus=True)[0])


def bf16_log_probs(path: str, **options: Any) -> Tensor:
    engine = build(path, dtype="bfloat16", **options)
    log_probs = engine.compute_log_probs(mini_batches()[0], limit=FEW_TOKENS)
    engine.close()
    return log_probs


def assert_near(log_probs: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(log_probs).all()
    assert (log_probs - expected)[expected != 0].abs().mean().item() < BF16_MEAN_TOLERANCE


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_bfloat16_packs_run_through_fused_attention(models, references, family) -> None:
    found = run_on_ranks(lambda: bf16_log_probs(models[family], packed=True), 1, on_gpus=True)[0]
    assert_near(found, references[family][0])


@pytest.mark.gpus(2)
def test_context_parallel_ranks_share_packed_sequences(models, references) -> None:
    found = run_on_ranks(lambda: bf16_log_probs(models["qwen2"], packed=True, layout={"cp": 2}), 2, on_gpus=True)[0]
    assert_near(found, references["qwen2"][0])
