"""A role saved in one layout and loaded in others, exported for transformers, and on a full disk."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import sglang_jobs
import torch
import torch.distributed as dist
from checkpoint_jobs import VOCAB, engine_of, export_model, new_folder, save, update, write_out
from megatron_reference import load_reference, make_batch, save_tiny_model
from ranks import run_on_ranks
from torch import Tensor

from mrl.backends.megatron import state_gather
from mrl.backends.megatron.checkpoint_write import HostBuffer, StagedCheckpoint
from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.norm import RMSNorm
from mrl.backends.sglang.preload import preload_sglang
from mrl.interfaces import CheckpointError
from mrl.reshard.hf_export import copy_model_files
from mrl.reshard.spec import load_spec
from mrl.trainer.checkpoint import CheckpointedRole, Checkpointer, LoopState
from mrl.trainer.manifest import describe_role
from mrl.trainer.resume import find_resume_point
from mrl.types import MicroBatchLimit

# Losses and gradient norms of size 1, after Adam steps whose gradients differ by rounding.
TOLERANCE = 2e-5
LOG_PROB_TOLERANCE = 1e-5
GREEDY = 16
# Batches of the steps after a save: moments that it lost would show in the second one's loss, not before.
LATER = (1, 2)

SEQUENCE_PARALLEL = {"tp": 2, "pp": 2, "sequence_parallel": True}
CASES: dict[str, tuple[str, str, bool, list[dict[str, Any]], list[dict[str, Any]]]] = {
    # 250 rows are padded for tp = 4 only, so its checkpoint's vocabulary has another size.
    "actor, distributed optimizer": (
        "actor",
        "qwen2",
        True,
        [SEQUENCE_PARALLEL, {"cp": 2}],
        [SEQUENCE_PARALLEL, {"pp": 2, "vpp": 2}, {"tp": 4}],
    ),
    "tied actor": ("actor", "llama", True, [{"tp": 4}], [{"pp": 2, "cp": 2}]),
    "experts": (
        "actor",
        "mixtral",
        True,
        [{"ep": 4}, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}],
        [{"ep": 4}, {"pp": 2, "vpp": 2, "ep": 2}],
    ),
    "critic, plain optimizer": (
        "critic",
        "llama",
        False,
        [{"pp": 2, "vpp": 2}, {"tp": 2}],
        [{"pp": 2, "vpp": 2}, {"tp": 2}],
    ),
}
"""Role, model, kind of optimizer, layouts that save and layouts that load."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        "qwen2": save_tiny_model(folder / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4),
        "mixtral": save_tiny_model(folder / "mixtral", "mixtral", vocab_size=VOCAB, kv_heads=2),
        "llama": save_tiny_model(folder / "llama", "llama", vocab_size=VOCAB, kv_heads=2, tied=True),
    }


@dataclass
class Outcome:
    """What update steps returned, or the largest differences of what they should have."""

    unbroken: tuple[list[dict[str, float]], list[dict[str, float]]]
    """The first step, and the later ones."""
    exported: list[dict[str, float]] | None
    """The later steps of a new engine that begins with the weights after the first."""
    resumed: list[dict[str, list[list[dict[str, float]]]]]
    """By loading layout: the first step from the fresh state, the later ones with the optimizer from checkpoints of
    several saving layouts, the first one's first, and without it from that."""


def run_case(
    model: str, kind: str, distributed: bool, saving: list[dict[str, Any]], loading: list[dict[str, Any]], folder: Path
) -> Outcome:
    """Steps, saved after the first in every layout, and the later ones from every checkpoint in every layout."""
    new_folder(folder)
    unbroken, exported = run_unbroken(model, kind, distributed, saving[0], folder)
    for number, axes in enumerate(saving[1:], start=1):
        engine = engine_of(model, kind, axes, distributed=distributed)
        update(engine, kind, 0)
        save(engine, new_folder(folder / f"trained{number}"))
        engine.close()
    resumed = []
    for place, axes in enumerate(loading):
        engine = engine_of(model, kind, axes, distributed=distributed)
        engine.load_checkpoint(folder / "trained0", ["model"])
        steps = {"without optimizer": [update(engine, kind, *LATER)], "with optimizer": []}
        # Two of them, not all: every one is loaded in several layouts, and each takes a second.
        for number in sorted({0, (place + 1) % len(saving)}):
            engine.load_checkpoint(folder / f"trained{number}")
            steps["with optimizer"].append(update(engine, kind, *LATER))
        engine.load_checkpoint(folder / "fresh")
        resumed.append({**steps, "fresh": [update(engine, kind, 0)]})
        engine.close()
    return Outcome(unbroken, exported, resumed)


def run_unbroken(model: str, kind: str, distributed: bool, axes: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    engine = engine_of(model, kind, axes, distributed=distributed)
    # Before its first step a role has no moments yet, as an actor that waits for its critic.
    save(engine, new_folder(folder / "fresh"))
    first = update(engine, kind, 0)
    # What is written later is the state of now.
    staged = [engine.stage_checkpoint(new_folder(folder / "trained0"), in_background=True)]
    if kind == "actor":
        staged.append(engine.stage_hugging_face(new_folder(folder / "model"), in_background=True))
    later = update(engine, kind, *LATER)
    for write in staged:
        write_out(write)
    engine.close()
    if kind == "critic":
        return (first, later), None
    if dist.get_rank() == 0:
        copy_model_files(Path(model), Path(model), folder / "model", dtype="float32")
    dist.barrier()
    engine = engine_of(str(folder / "model"), kind, axes, distributed=distributed)
    exported = update(engine, kind, *LATER)
    engine.close()
    return (first, later), exported


def close_to(steps: list[dict[str, float]]) -> Any:
    return [pytest.approx(step, rel=TOLERANCE, abs=TOLERANCE) for step in steps]


def test_training_goes_on_in_any_layout_and_bitwise_in_the_same(models, tmp_path) -> None:
    def run_all() -> list[Outcome]:
        return [
            run_case(models[family], kind, distributed, saving, loading, tmp_path / str(number))
            for number, (kind, family, distributed, saving, loading) in enumerate(CASES.values())
        ]

    for case, outcome in zip(CASES, run_on_ranks(run_all, 4, timeout_s=240)[0], strict=True):
        *_, saving, loading = CASES[case]
        first, later = outcome.unbroken
        anew = outcome.exported or outcome.resumed[0]["without optimizer"][0]
        assert anew != close_to(later)
        for axes, resumed in zip(loading, outcome.resumed, strict=True):
            assert resumed["fresh"] == [close_to(first)], (case, axes)
            for result in resumed["with optimizer"]:
                assert result == close_to(later), (case, axes)
            assert resumed["without optimizer"] == [close_to(anew)], (case, axes)
            if axes == saving[0]:
                assert resumed["fresh"] == [first], (case, axes)
                assert resumed["with optimizer"][0] == later, (case, axes)


def test_an_export_is_the_model_that_the_trainer_has(models, tmp_path) -> None:
    batch = make_batch(VOCAB, 4, seed=9)
    layouts = {"qwen2": {"tp": 2, "cp": 2}, "llama": {"tp": 2, "pp": 2, "vpp": 2}}

    def run_all() -> list[torch.Tensor]:
        log_probs = []
        for family, axes in layouts.items():
            engine = engine_of(models[family], "actor", axes, distributed=True)
            update(engine, "actor", 0)
            staged = engine.stage_hugging_face(new_folder(tmp_path / family), in_background=True)
            log_probs.append(engine.compute_log_probs(batch, limit=MicroBatchLimit(samples=2)))
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


def test_layers_with_states_of_their_own_load_what_others_wrote(models, tmp_path, monkeypatch) -> None:
    """As transformer-engine's norms after megatron's local layers."""

    def run() -> bool:
        engine = engine_of(models["qwen2"], "actor", {"tp": 2}, distributed=True)
        save(engine, new_folder(tmp_path / "local"))
        unbroken = update(engine, "actor", 0)
        engine.close()
        monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.empty(0), raising=False)
        monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: pytest.fail("loaded"), raising=False)
        engine = engine_of(models["qwen2"], "actor", {"tp": 2}, distributed=True)
        engine.load_checkpoint(tmp_path / "local")
        return unbroken == update(engine, "actor", 0)

    assert run_on_ranks(run, 2) == [True, True]


def test_ranges_of_the_optimizers_state_are_gathered_in_pieces(monkeypatch) -> None:
    # A buffer of 44 elements, of which the bucket has those from 4 onwards: 10 of 4 ranks each, the last 3 padding.
    wanted = {0: [(0, 5), (30, 41)], 1: [], 2: [(5, 30)], 3: [(41, 44)]}

    def run() -> Tensor:
        monkeypatch.setattr(state_gather, "PIECE_ELEMENTS", 12)
        rank, target = dist.get_rank(), torch.zeros(41)
        mine = torch.arange(10.0) + 10 * rank + 4
        state_gather.gather_ranges(target, mine, wanted[rank], 4, dist.group.WORLD, device=torch.device("cpu"))
        return target

    for rank, target in enumerate(run_on_ranks(run, 4)):
        places = torch.arange(41)
        mine = sum(((places >= low) & (places < high) for low, high in wanted[rank]), torch.zeros(41, dtype=torch.bool))
        assert torch.equal(target, torch.where(mine & (places >= 4), places.float(), 0.0))


def test_zeros_of_other_ranks_parameters_take_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = state_gather._untouched_zeros(1 << 26)
    zeros[100:200] = 1.0
    assert zeros[50:300].sum() == 100
    assert process.memory_info().rss - before < zeros.nbytes / 8


def test_parameters_are_shared_out_by_size() -> None:
    assert state_gather.share_out([8, 2, 2, 3, 5], 2) == [0, 1, 1, 1, 1]
    assert state_gather.share_out([1, 1, 1], 4) == [0, 1, 2]
    assert state_gather.share_out([3, 4], 1) == [0, 0]


def test_each_rank_holds_its_share_of_the_optimizers_state(models, tmp_path, monkeypatch, caplog) -> None:
    def run() -> tuple[int, list[int], str]:
        engine = engine_of(models["qwen2"], "actor", {}, distributed=True)
        held = 0
        original = state_gather._owned_entries

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal held
            entries = original(*args, **options)
            held += sum(tensor.data.numel() for tensors in entries.values() for tensor in tensors.values())
            return entries

        monkeypatch.setattr(state_gather, "_owned_entries", counted)
        save(engine, new_folder(tmp_path / "saved"))
        return held, [parameter.numel() for _, parameter in engine.named_parameters()], caplog.text

    counts = run_on_ranks(run, 2)
    sizes = counts[0][1]
    # Each parameter and its two moments.
    assert sum(held for held, _, _ in counts) == 3 * sum(sizes)
    assert all(held <= 3 * (sum(sizes) / 2 + max(sizes)) for held, _, _ in counts)
    # Megatron finds nothing in which the ranks disagree.
    assert not any("differs" in text for _, _, text in counts)


def checkpointer_of(engine: MegatronEngine, model: str, root: Path) -> Checkpointer:
    role = CheckpointedRole(
        engine=engine,
        record=describe_role(
            load_spec(model), engine.layout, dtype="float32", distributed_optimizer=True, is_critic=False
        ),
        max_to_keep=None,
        copy_model_files=partial(copy_model_files, Path(model), Path(model), dtype="float32"),
        exports_hugging_face=True,
        async_save=True,
    )
    return Checkpointer(root=root, roles={"actor": role}, save_freq=1, total_steps=1)


def test_a_background_write_that_fails_on_one_rank_is_raised_on_all_later(models, tmp_path) -> None:
    model, root = models["qwen2"], tmp_path / "checkpoints"

    def run() -> Any:
        engine = engine_of(model, "actor", {"tp": 2}, distributed=True)
        checkpointer = checkpointer_of(engine, model, root)

        def save_and_train(folder: Path) -> None:
            checkpointer.save(LoopState(step=1, weight_version=0, prompts={}, kl_controller={}))
            update(engine, "actor", 0)
            checkpointer.finish()

        message = failure(save_and_train, root, on_rank=1)
        dist.barrier()
        left = sorted(path.name for path in root.iterdir())
        checkpointer.save(LoopState(step=2, weight_version=0, prompts={}, kl_controller={}))
        unbroken = update(engine, "actor", *LATER)
        checkpointer.finish()
        point = find_resume_point("resume_path", tmp_path, str(root / "global_step_2"), {})
        state = checkpointer.load(point)
        return message, left, state and state.step, unbroken == update(engine, "actor", *LATER)

    for message, left, step, equal in run_on_ranks(run, 2):
        assert re.search(r"cannot write the checkpoint \S+: rank 1: .*File too large.*Free space", message), message
        assert (left, step, equal) == ([], 2, True)
    names = {path.name for path in (root / "global_step_2/actor/huggingface").iterdir()}
    assert {"config.json", "model.safetensors"} <= names


def copy_as_from_a_device(staged: StagedCheckpoint, host: HostBuffer) -> None:
    """What `detach` does with device tensors, done with host tensors."""
    ((path, key, (objects, items)),) = staged._buckets
    copies = host.copy([tensor for _, tensor in items])
    staged._buckets = [(path, key, (objects, [(item, copy) for (item, _), copy in zip(items, copies, strict=True)]))]


def test_copies_in_one_buffer_are_written_as_the_tensors_they_are(models, tmp_path) -> None:
    def run() -> Any:
        engine, host = engine_of(models["qwen2"], "actor", {"tp": 2}, distributed=False), HostBuffer()
        update(engine, "actor", 0)
        save(engine, new_folder(tmp_path / "plain"))
        for name in ("copied", "again"):
            staged = engine.stage_checkpoint(new_folder(tmp_path / name), in_background=False)
            copy_as_from_a_device(staged, host)
            if name == "copied":
                unbroken = update(engine, "actor", *LATER)
            write_out(staged)
            engine.load_checkpoint(tmp_path / name)
        return unbroken, update(engine, "actor", *LATER)

    for unbroken, resumed in run_on_ranks(run, 2):
        assert resumed == unbroken
    sizes = [sorted(file.stat().st_size for file in (tmp_path / name).glob("*.distcp")) for name in ("plain", "copied")]
    assert sizes[0] == sizes[1]


def train_export_and_generate(model: str, export: Path) -> list[list[int]]:
    """Greedy tokens of a run's engine, which pulled the weights that are exported."""
    engine = sglang_jobs.start(Path(model), tp_size=1, context_length=64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        actor = engine_of(model, "actor", {}, distributed=True)
        update(actor, "actor", 0)
        write_out(actor.stage_hugging_face(new_folder(export), in_background=False))
        copy_model_files(Path(model), Path(model), export, dtype="float32")
        control = {"spec": load_spec(model).to_json(), "sources": [actor.export_weights().to_json()]}
        engine.update_weights(control, weight_version=1)
        generations = engine.generate(sglang_jobs.PROMPTS, sglang_jobs.sampling(GREEDY, temperature=0.0))
        actor.close()
    finally:
        engine.shutdown()
        dist.destroy_process_group()
    return [list(each.response_ids) for each in generations]


def generate_from_files(folder: Path) -> list[list[int]]:
    """Greedy tokens of an engine that loaded its weights itself."""
    engine = sglang_jobs.start(folder, tp_size=1, context_length=64, engine_kwargs={"load_format": "auto"})
    try:
        params = sglang_jobs.sampling(GREEDY, temperature=0.0)
        # Below the wrapper, which asks for weights from a trainer first.
        outputs: dict[int, dict[str, Any]] = {}
        engine._call(engine._answer_all(sglang_jobs.PROMPTS, params, outputs), "generate")
    finally:
        engine.shutdown()
    return [outputs[index]["output_ids"] for index in range(len(sglang_jobs.PROMPTS))]


@pytest.mark.engine
def test_sglang_loads_an_export_and_generates_what_the_runs_engine_does(models, tmp_path) -> None:
    preload_sglang()
    ours = sglang_jobs.in_own_process(train_export_and_generate, models["llama"], tmp_path / "export")
    assert all(len(tokens) == GREEDY for tokens in ours)
    assert sglang_jobs.in_own_process(generate_from_files, tmp_path / "export") == ours
    untrained = sglang_jobs.in_own_process(generate_from_files, Path(models["llama"]))
    assert untrained != ours
