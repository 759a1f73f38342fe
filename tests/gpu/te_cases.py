"""What the ranks of the tests beside it run. Importing this starts CUDA, which the tests' own process must not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from family_configs import FAMILY_CONFIGS
from forced_experts import ForcedReference, batch_with_experts
from megatron_cases import run_reference
from megatron_reference import (
    OPTIMIZER,
    TEMPERATURE,
    load_reference,
    make_batch,
    policy_loss,
    save_random_model,
)
from safetensors.torch import load_file
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit, TrainBatch

VOCAB = 500
FEW_TOKENS = MicroBatchLimit(tokens=40)
OVERLAPPED = DataParallelSettings(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
DENSE = ("llama", "qwen2", "qwen3", "mistral")
EXPERTS = ("qwen3_moe", "mixtral")

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
ON_TWO_EXPERTS: dict[str, dict[str, Any]] = {
    "ep2 packed": {"layout": {"ep": 2}, "packed": True},
    "etp2 packed": {"layout": {"etp": 2}, "packed": True, "limit": FEW_TOKENS},
}
REPLAYED = {"packed": True, "router_replay": True, "recompute": Recompute(granularity="full")}


def prepare(folder: Path) -> tuple[dict[str, str], dict[str, tuple[Any, ...]]]:
    """A random model of every family, and what transformers makes of each; of some also with experts forced on it."""
    models = {name: save_random_model(folder / name, config) for name, config in FAMILY_CONFIGS.items()}
    references = {name: run_reference(load_reference(path), mini_batches()) for name, path in models.items()}
    for family in EXPERTS:
        forced = ForcedReference(load_reference(models[family]).model)
        references[f"{family} replayed"] = run_reference(forced, mini_batches(family))
    return models, references


def mini_batches(replayed: str = "") -> list[TrainBatch]:
    """Two of them; with experts to replay where a family is named."""
    if replayed:
        return [batch_with_experts(VOCAB, replayed, seed=seed) for seed in range(2)]
    return [make_batch(VOCAB, 7, seed=seed) for seed in range(2)]


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


def train(path: str, options: dict[str, Any], replayed: str = "") -> tuple[Any, ...]:
    options, batches = dict(options), mini_batches(replayed)
    limit = options.pop("limit", MicroBatchLimit(samples=2))
    engine = build(path, **options)
    log_probs = engine.compute_log_probs(batches[0], limit=limit)
    log = [engine.update(batch, policy_loss(batch), limit=limit, with_entropy=True) for batch in batches]
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


def train_all(models: dict[str, str], cases: dict[str, dict[str, Any]], families: tuple[str, ...]) -> dict[str, Any]:
    return {f"{family}, {case}": train(models[family], cases[case]) for family in families for case in cases}


def replay_all(models: dict[str, str], **options: Any) -> dict[str, Any]:
    return {f"{family} replayed, packed": train(models[family], REPLAYED | options, family) for family in EXPERTS}


def bf16_log_probs(path: str, **options: Any) -> Tensor:
    engine = build(path, dtype="bfloat16", **options)
    log_probs = engine.compute_log_probs(mini_batches()[0], limit=FEW_TOKENS)
    engine.close()
    return log_probs


def run_on_one(models: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trainings in float32, and log-probs of packs in bfloat16, which fused attention needs."""
    trained = train_all(models, ON_ONE, (*DENSE, *EXPERTS)) | replay_all(models)
    return trained, {family: bf16_log_probs(path, packed=True) for family, path in models.items()}


def run_on_two(models: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same over two GPUs; sequences that are shared run in bfloat16 only."""
    trained = train_all(models, ON_TWO, ("qwen2", "qwen3")) | train_all(models, ON_TWO_EXPERTS, EXPERTS)
    trained |= replay_all(models, layout={"tp": 2, "ep": 2, "sequence_parallel": True})
    return trained, {"qwen2": bf16_log_probs(models["qwen2"], packed=True, layout={"cp": 2})}
