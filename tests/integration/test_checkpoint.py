"""A role saved in one layout and loaded in others, exported for transformers, and on a full disk."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_reference import (
    OPTIMIZER,
    TEMPERATURE,
    load_reference,
    make_batch,
    policy_loss,
    save_tiny_model,
    value_loss,
)
from ranks import run_on_ranks

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.interfaces import CheckpointError, CheckpointWrite
from mrl.parallel.agreement import gather_results
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.hf_export import copy_model_files
from mrl.reshard.spec import load_spec

VOCAB = 250
# Losses and gradient norms of size 1, after Adam steps whose gradients differ by rounding.
TOLERANCE = 2e-5
LOG_PROB_TOLERANCE = 1e-5

CASES: dict[str, tuple[str, str, bool, dict[str, Any], list[dict[str, Any]]]] = {
    # 250 rows are padded for tp = 4 only, so its checkpoint's vocabulary has another size.
    "actor, distributed optimizer": (
        "actor",
        "qwen2",
        True,
        {"tp": 2, "pp": 2, "sequence_parallel": True},
        [{"tp": 2, "pp": 2, "sequence_parallel": True}, {"tp": 4}, {"pp": 2, "vpp": 2}],
    ),
    "tied actor": ("actor", "llama", True, {"tp": 4}, [{"pp": 2}]),
    "critic, plain optimizer": ("critic", "llama", False, {"pp": 4, "vpp": 2}, [{"pp": 4, "vpp": 2}, {"tp": 2}]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        "qwen2": save_tiny_model(folder / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4),
        "llama": save_tiny_model(folder / "llama", "llama", vocab_size=VOCAB, kv_heads=2, tied=True),
    }


def engine_of(path: str, kind: str, axes: dict[str, Any], *, distributed: bool) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind=kind,
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=dist.get_world_size(), **axes),
            temperature=TEMPERATURE,
            optimizer=OPTIMIZER,
            data_parallel=DataParallelSettings(use_distributed_optimizer=distributed),
        )
    )


def update(engine: MegatronEngine, kind: str, *seeds: int) -> list[dict[str, float]]:
    loss = policy_loss if kind == "actor" else value_loss
    batches = [make_batch(VOCAB, 5, seed=seed) for seed in seeds]
    return [engine.update(b, loss(b), micro_batch_size=2, with_entropy=kind == "actor") for b in batches]


def new_folder(folder: Path) -> Path:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def write_out(write: CheckpointWrite) -> None:
    gather_results(write.write)
    write.finish()


def save(engine: MegatronEngine, folder: Path) -> None:
    write_out(engine.stage_checkpoint(folder, in_background=False))


def export_model(engine: MegatronEngine, folder: Path) -> None:
    write_out(engine.stage_hugging_face(folder, in_background=False))


def run_case(path: str, kind: str, distributed: bool, saved: dict[str, Any], others: list[Any], folder: Path) -> Any:
    """What further steps return: unbroken, and after loading in each of the other layouts."""
    engine = engine_of(path, kind, saved, distributed=distributed)
    # Before its first step a role has no moments yet, as an actor that waits for its critic.
    save(engine, new_folder(folder / "fresh"))
    first = update(engine, kind, 0)
    # What is written later is the state of now.
    staged = engine.stage_checkpoint(new_folder(folder / "trained"), in_background=True)
    second = update(engine, kind, 1)
    write_out(staged)
    engine.close()
    resumed = []
    for axes in others:
        engine = engine_of(path, kind, axes, distributed=distributed)
        engine.load_checkpoint(folder / "trained")
        after_one = update(engine, kind, 1)
        engine.load_checkpoint(folder / "fresh")
        resumed.append((update(engine, kind, 0), after_one))
        engine.close()
    return (first, second), resumed


def test_training_goes_on_in_any_layout_and_bitwise_in_the_same(models, tmp_path) -> None:
    def run_all() -> list[Any]:
        results = []
        for number, (kind, family, distributed, saved, others) in enumerate(CASES.values()):
            folder = new_folder(tmp_path / str(number))
            results.append(run_case(models[family], kind, distributed, saved, others, folder))
        return results

    for case, (unbroken, resumed) in zip(CASES, run_on_ranks(run_all, 4, timeout_s=280)[0], strict=True):
        *_, saved, others = CASES[case]
        for axes, result in zip(others, resumed, strict=True):
            if axes == saved:
                assert result == unbroken, (case, axes)
                continue
            for ours, theirs in zip(result, unbroken, strict=True):
                assert ours == [pytest.approx(step, rel=TOLERANCE, abs=TOLERANCE) for step in theirs], (case, axes)


def test_an_export_is_the_model_that_the_trainer_has(models, tmp_path) -> None:
    batch = make_batch(VOCAB, 4, seed=9)
    layouts = {"qwen2": {"tp": 4}, "llama": {"tp": 2, "pp": 2, "vpp": 2}}

    def run_all() -> list[torch.Tensor]:
        log_probs = []
        for family, axes in layouts.items():
            engine = engine_of(models[family], "actor", axes, distributed=True)
            update(engine, "actor", 0)
            staged = engine.stage_hugging_face(new_folder(tmp_path / family), in_background=True)
            log_probs.append(engine.compute_log_probs(batch, micro_batch_size=2))
            update(engine, "actor", 1)
            write_out(staged)
            engine.close()
        return log_probs

    def load_all() -> list[torch.Tensor]:
        with torch.no_grad():
            return [load_reference(str(tmp_path / family)).outputs(batch)["log_probs"] for family in layouts]

    ours = run_on_ranks(run_all, 4)[0]
    for family in layouts:
        copy_model_files(Path(models[family]), Path(models[family]), tmp_path / family, dtype="float32")
    # Forked like the ranks: the test process must not start threads before it forks again.
    for left, right in zip(ours, run_on_ranks(load_all, 1)[0], strict=True):
        torch.testing.assert_close(left, right, atol=LOG_PROB_TOLERANCE, rtol=0)


def failure(save: Callable[[Path], None], folder: Path, *, on_rank: int) -> str:
    """What `save` raises where the system refuses one rank longer files, as it refuses any on a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    with pytest.raises(CheckpointError) as error:
        save(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return str(error.value)


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_harms_nothing(models, tmp_path) -> None:
    def run() -> Any:
        engine = engine_of(models["qwen2"], "actor", {"tp": 2}, distributed=True)
        messages = [
            failure(partial(save, engine), new_folder(tmp_path / "full"), on_rank=1),
            failure(partial(export_model, engine), new_folder(tmp_path / "export"), on_rank=0),
        ]
        save(engine, new_folder(tmp_path / "enough"))
        unbroken = update(engine, "actor", 0)
        engine.load_checkpoint(tmp_path / "enough")
        return messages, unbroken == update(engine, "actor", 0)

    for (checkpoint, export), equal in run_on_ranks(run, 2):
        assert re.search(r"cannot write the checkpoint \S+/full/\S+: rank 1: .*File too large", checkpoint), checkpoint
        assert re.search(r"cannot write the model \S+/export: rank 0: .*File too large", export), export
        assert equal
