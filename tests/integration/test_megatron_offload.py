"""Roles whose memory leaves between uses, over real megatron optimizers; copies are made as late as a device might."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from late_copier import LateCopier
from megatron_reference import OPTIMIZER, make_batch, policy_loss, save_tiny_model, value_loss
from ranks import run_on_ranks

from mrl.backends.megatron import setup
from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.offload import OffloadSettings
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit

VOCAB = 250
PAIRS = MicroBatchLimit(samples=2)
EVERYTHING = OffloadSettings(parameters=True, gradients=True, optimizer=True)
ALL_BUT_PARAMETERS = OffloadSettings(gradients=True, optimizer=True)
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
OVERLAPPED = DataParallelSettings(
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    bucket_size=60_000,
    resumable=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4)


def build(path: str, kind: str, **options: Any) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind=kind,  # type: ignore[arg-type]
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=dist.get_world_size()),
            optimizer=None if kind == "reference" else OPTIMIZER,
            **options,
        )
    )


def storages(engine: MegatronEngine) -> tuple[int, int]:
    """Bytes of the parameters and of the optimizer's state that are there."""
    state = [item.untyped_storage().nbytes() for item in engine._offload._optimizer_tensors()]
    return sum(item.untyped_storage().nbytes() for _, item in engine.named_parameters()), sum(state)


def train(engine: MegatronEngine, kind: str) -> list[Any]:
    """Passes and updates of three steps, with whatever the role gives back between them."""
    log: list[Any] = []
    for step in range(3):
        batch = make_batch(VOCAB, 6, seed=step)
        engine.onload()
        forward = engine.compute_values if kind == "critic" else engine.compute_log_probs
        log.append(forward(batch, limit=PAIRS))
        engine.offload()
        loss = value_loss if kind == "critic" else policy_loss
        log += [engine.update(batch, loss(batch), limit=PAIRS, with_entropy=kind == "actor") for _ in range(2)]
        engine.offload()
    return log


def compare(path: str, kind: str, offload: OffloadSettings, options: dict[str, Any]) -> Any:
    logs, left = [], []
    for settings in (OffloadSettings(), offload):
        engine = build(path, kind, offload=settings, **options)
        logs.append(train(engine, kind))
        left.append(storages(engine))
        engine.close()
    return *logs, *left


@pytest.mark.parametrize(
    ("kind", "offload", "options"),
    [
        ("actor", ALL_BUT_PARAMETERS, {"dtype": "bfloat16", "data_parallel": DISTRIBUTED}),
        ("critic", EVERYTHING, {"dtype": "bfloat16", "data_parallel": OVERLAPPED}),
        ("critic", EVERYTHING, {"dtype": "bfloat16"}),
        ("critic", EVERYTHING, {"dtype": "float32", "data_parallel": DISTRIBUTED}),
    ],
)
def test_a_role_that_gives_its_memory_back_trains_bitwise_as_one_that_keeps_it(
    model: str, monkeypatch: pytest.MonkeyPatch, kind: str, offload: OffloadSettings, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(setup, "build_copier", lambda device: LateCopier())
    for kept, moved, resident, left in run_on_ranks(partial(compare, model, kind, offload, options), 2):
        for expected, found in zip(kept, moved, strict=True):
            assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found
        assert min(resident) > 0
        assert left == (0 if offload.parameters else resident[0], 0), "the optimizer's state has not left"


def frozen(path: str) -> tuple[list[torch.Tensor], int]:
    engine = build(path, "reference", offload=OffloadSettings(parameters=True))
    batch, results = make_batch(VOCAB, 4, seed=0), []
    for _ in range(3):
        results.append(engine.compute_log_probs(batch, limit=PAIRS))
        engine.offload()
    copier: Any = engine._parts.copier
    return results, copier.log.count("out")


def test_a_frozen_role_is_copied_to_the_host_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "build_copier", lambda device: LateCopier())
    [(results, departures)] = run_on_ranks(partial(frozen, model), 1)
    assert departures == 1
    assert all(torch.equal(result, results[0]) for result in results)


def save_while_away(path: str, folder: Path) -> list[Any]:
    """A checkpoint taken and loaded while the state is away, and the step after it against the unbroken run's."""
    batch = make_batch(VOCAB, 6, seed=0)
    options: dict[str, Any] = {"dtype": "bfloat16", "data_parallel": DISTRIBUTED, "offload": ALL_BUT_PARAMETERS}
    engine = build(path, "actor", **options)
    engine.update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)
    engine.offload()
    staged = engine.stage_checkpoint(folder, in_background=False)
    staged.write()
    staged.finish()
    engine.offload()
    unbroken = engine.update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)
    engine.offload()
    engine.load_checkpoint(folder)
    engine.offload()
    return [unbroken, engine.update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)]


def test_a_checkpoint_of_a_role_that_is_away_is_right(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "build_copier", lambda device: LateCopier())
    for unbroken, resumed in run_on_ranks(partial(save_while_away, model, tmp_path), 2):
        assert unbroken == resumed


def stale_bytes(path: str) -> int:
    """Bytes of the exported parameters that differ between two data-parallel ranks after an update."""
    engine = build(path, "actor", data_parallel=OVERLAPPED)
    engine.export_weights()
    batch = make_batch(VOCAB, 6, seed=0)
    engine.update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)
    engine.release()
    flat = torch.cat([parameter.detach().flatten() for _, parameter in engine.named_parameters()])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    return int((others[0] != others[1]).sum())


def test_engines_never_read_parameters_that_are_still_to_be_gathered(model: str) -> None:
    assert run_on_ranks(partial(stale_bytes, model), 2) == [0, 0]
