"""The conversion tools against what a role's own ranks write and load."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from family_configs import FAMILY_CONFIGS
from megatron_reference import OPTIMIZER, TEMPERATURE, load_reference, make_batch, policy_loss, save_tiny_model
from ranks import run_on_ranks
from safetensors.torch import load_file

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.convert.command import main
from mrl.convert.safetensors_files import SafetensorsWriter
from mrl.convert.weights import TensorInfo
from mrl.interfaces import CheckpointWrite
from mrl.parallel.agreement import gather_results
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import spec_from_config, tensor_shapes
from mrl.reshard.hf_export import copy_model_files
from mrl.reshard.spec import load_spec
from mrl.trainer.manifest import Manifest, describe_role, list_files, record_files, write_manifest
from mrl.types import MicroBatchLimit

VOCAB = 250
# 250 rows are padded for tp = 4 only.
LAYOUTS = {"qwen2": {"tp": 4}, "llama": {"tp": 2, "pp": 2, "vpp": 2}, "mixtral": {"ep": 2, "etp": 2}}
OTHER = {"tp": 2, "pp": 2}
LOG_PROB_TOLERANCE = 1e-5


def convert(*arguments: Any) -> int:
    return main([*map(str, arguments), "--quiet"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen2": Path(save_tiny_model(folder / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4)),
        "llama": Path(save_tiny_model(folder / "llama", "llama", vocab_size=VOCAB, kv_heads=2, tied=True)),
        "mixtral": Path(save_tiny_model(folder / "mixtral", "mixtral", vocab_size=VOCAB, kv_heads=2)),
    }


def engine_of(weights: Path, model: Path, axes: dict[str, int], kind: str = "actor") -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind=kind,
            model_path=str(weights),
            spec=load_spec(model),
            layout=ParallelLayout(world_size=dist.get_world_size(), **axes),
            temperature=TEMPERATURE,
            optimizer=OPTIMIZER,
        )
    )


def step(engine: MegatronEngine, seed: int) -> dict[str, float]:
    batch = make_batch(VOCAB, 5, seed=seed)
    return engine.update(batch, policy_loss(batch), limit=MicroBatchLimit(samples=2), with_entropy=True)


def write_out(write: CheckpointWrite) -> None:
    gather_results(write.write)
    write.finish()


def save_run(engine: MegatronEngine, model: Path, root: Path, kind: str) -> None:
    """Write a checkpoint's folder with this one role, as a run does."""
    if dist.get_rank() == 0:
        for name in ("dist_ckpt", "huggingface", "export"):
            (root / kind / name).mkdir(parents=True)
    dist.barrier()
    write_out(engine.stage_checkpoint(root / kind / "dist_ckpt", in_background=False))
    if kind == "actor":
        write_out(engine.stage_hugging_face(root / kind / "export", in_background=False))
    if dist.get_rank() == 0:
        copy_model_files(model, model, root / kind / "huggingface", dtype="float32")
        record = describe_role(
            load_spec(model), engine.layout, dtype="float32", distributed_optimizer=True, is_critic=kind == "critic"
        )
        files = record_files(root, list_files(root))
        write_manifest(root, Manifest(step=1, weight_version=1, roles={kind: record}, files=files))
    dist.barrier()


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folder of each family's checkpoint after one step, and what the second step returned."""
    root = tmp_path_factory.mktemp("runs")

    def train() -> dict[str, dict[str, float]]:
        second = {}
        for family, axes in LAYOUTS.items():
            engine = engine_of(models[family], models[family], axes)
            step(engine, 0)
            save_run(engine, models[family], root / family, "actor")
            second[family] = step(engine, 1)
            engine.close()
        critic = engine_of(models["llama"], models["llama"], OTHER, "critic")
        save_run(critic, models["llama"], root / "critic", "critic")
        critic.close()
        return second

    return {"root": root, "second": run_on_ranks(train, 4, timeout_s=120)[0]}


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_converted_checkpoint_is_the_runs_own_export(runs, models, tmp_path, family):
    checkpoint, out = runs["root"] / family, tmp_path / "model"
    assert convert("verify", checkpoint) == 0
    assert convert("megatron2hf", "--checkpoint", checkpoint, "--out", out) == 0
    own = checkpoint / "actor/export"
    theirs = {name: tensor for file in own.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert convert("diff", own, checkpoint / "actor") == 0
    # The step has moved the weights.
    assert convert("diff", models[family], checkpoint, "--only-different") == 1
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def test_transformers_loads_a_converted_checkpoint_with_the_actors_log_probs(runs, models, tmp_path):
    batch = make_batch(VOCAB, 4, seed=9)
    for family in LAYOUTS:
        assert convert("megatron2hf", "--checkpoint", runs["root"] / family, "--out", tmp_path / family) == 0

    def actors() -> list[torch.Tensor]:
        log_probs = []
        for family, axes in LAYOUTS.items():
            engine = engine_of(models[family], models[family], axes)
            engine.load_checkpoint(runs["root"] / family / "actor/dist_ckpt")
            log_probs.append(engine.compute_log_probs(batch, limit=MicroBatchLimit(samples=2)))
            engine.close()
        return log_probs

    def references() -> list[torch.Tensor]:
        with torch.no_grad():
            return [load_reference(str(tmp_path / family)).outputs(batch)["log_probs"] for family in LAYOUTS]

    ours = run_on_ranks(actors, 4)[0]
    # Forked like the ranks: the test process must not start threads before it forks again.
    for left, right in zip(ours, run_on_ranks(references, 1)[0], strict=True):
        torch.testing.assert_close(left, right, atol=LOG_PROB_TOLERANCE, rtol=0)


def test_a_role_takes_its_weights_from_a_converted_model_or_a_runs_checkpoint(runs, models, tmp_path):
    converted = tmp_path / "converted"
    assert convert("hf2megatron", "--hf", models["qwen2"], "--out", converted, "--tp", 2, "--pp", 2) == 0

    def weights_of(weights: Path, axes: dict[str, int], kind: str = "actor") -> dict[str, torch.Tensor]:
        engine = engine_of(weights, models["qwen2"], axes, kind)
        values = {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}
        engine.close()
        return values

    def run() -> bool:
        equal = True
        for axes in (OTHER, {"tp": 4}):
            own, other = weights_of(models["qwen2"], axes), weights_of(converted, axes)
            equal &= all(torch.equal(own[name], other[name]) for name in own)
        trained = weights_of(runs["root"] / "qwen2", OTHER)
        exported = weights_of(runs["root"] / "qwen2/actor/export", OTHER)
        equal &= all(torch.equal(trained[name], exported[name]) for name in trained)
        backbone, plain = weights_of(converted, OTHER, "critic"), weights_of(models["qwen2"], OTHER, "critic")
        return equal and all(torch.equal(backbone[name], plain[name]) for name in plain)

    assert run_on_ranks(run, 4, timeout_s=120) == [True] * 4


@pytest.mark.parametrize(("family", "axes"), [("qwen2", OTHER), ("mixtral", LAYOUTS["mixtral"])])
def test_megatron_core_loads_a_converted_model(models, tmp_path, family, axes):
    converted = tmp_path / "converted"
    assert convert("hf2megatron", "--hf", models[family], "--out", converted) == 0

    def run() -> bool:
        # Not at the top: the backend has to be imported first.
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling

        engine = engine_of(models[family], models[family], axes)
        parts = engine._parts
        with parts.state, torch.no_grad():
            [chunk] = parts.chunks
            wanted = {name: parameter.clone() for name, parameter in chunk.bare.named_parameters()}
            for parameter in chunk.bare.parameters():
                parameter.zero_()
            state = chunk.bare.sharded_state_dict(metadata={"dp_cp_group": parts.groups.dp_cp})
            loaded = dist_checkpointing.load(
                state, str(converted / "dist_ckpt"), strict=StrictHandling.RAISE_UNEXPECTED
            )
            loaded.pop("content_metadata", None)
            chunk.bare.load_state_dict(loaded)
            equal = all(torch.equal(parameter, wanted[name]) for name, parameter in chunk.bare.named_parameters())
        engine.close()
        return equal

    assert run_on_ranks(run, 4) == [True] * 4


def test_a_run_goes_on_from_a_resharded_checkpoint_as_from_its_own(runs, models, tmp_path):
    for family in LAYOUTS:
        out = tmp_path / family
        assert convert("reshard", "--checkpoint", runs["root"] / family, "--out", out, "--tp", 2, "--pp", 2) == 0
        assert convert("verify", out) == 0
        assert convert("diff", runs["root"] / family, out, "--optimizer") == 0
        saved = json.loads((out / "manifest.json").read_text())["roles"]["actor"]["layout"]
        assert saved == {**asdict(ParallelLayout(world_size=4, tp=2, pp=2, sequence_parallel=True))}
        assert (out / "actor/huggingface/config.json").is_file()

    def resume() -> list[dict[str, float]]:
        seconds = []
        for family, axes in LAYOUTS.items():
            engine = engine_of(models[family], models[family], axes)
            engine.load_checkpoint(tmp_path / family / "actor/dist_ckpt")
            seconds.append(step(engine, 1))
            engine.close()
        return seconds

    # The layout is the one that saved: bitwise.
    assert run_on_ranks(resume, 4)[0] == [runs["second"][family] for family in LAYOUTS]


def test_a_critic_is_verified_compared_and_resharded_but_is_no_causal_model(runs, tmp_path, capsys):
    critic = runs["root"] / "critic"
    assert convert("verify", critic) == 0
    assert convert("reshard", "--checkpoint", critic, "--out", tmp_path / "critic", "--tp", 4) == 0
    assert convert("diff", critic, tmp_path / "critic", "--role", "critic", "--optimizer") == 0
    capsys.readouterr()
    assert convert("diff", critic, tmp_path / "critic", "--role", "critic") == 0
    assert "value_head.weight" in capsys.readouterr().out
    assert convert("megatron2hf", "--checkpoint", critic / "critic", "--out", tmp_path / "model") == 2
    assert "a value head has no place in a Hugging Face causal model" in capsys.readouterr().err


def peak_growth_mib(*arguments: Any) -> float:
    """By how much a conversion's resident memory exceeds, at its peak, what its process began with."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        before = psutil.Process(os.getpid()).memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")
        status = convert(*arguments)
        [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        writer.send((status, int(peak.split()[1]) / 1024 - before / 2**20))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    status, growth = reader.recv()
    assert status == 0
    return growth


def test_memory_does_not_grow_with_the_model(tmp_path):
    # What is read ahead takes up to 192 MiB, and the largest shard of a layer 16 MiB.
    config = {**FAMILY_CONFIGS["llama"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    shapes = tensor_shapes(spec_from_config(config))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    tensors = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    with SafetensorsWriter(model / "model.safetensors", tensors) as file:
        for shape in shapes.values():
            file.append(torch.full(shape, 0.5, dtype=torch.bfloat16))
        file.finish()
    size = (model / "model.safetensors").stat().st_size / 2**20
    assert size > 512
    for arguments in (
        ("hf2megatron", "--hf", model, "--out", tmp_path / "checkpoint", "--tp", 2),
        ("reshard", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "resharded"),
        ("megatron2hf", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "back"),
        ("diff", model, tmp_path / "back"),
        ("verify", tmp_path / "back"),
    ):
        growth = peak_growth_mib(*arguments)
        assert growth < 320, (arguments, growth)
