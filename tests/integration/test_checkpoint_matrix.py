"""Every family saved in one layout and loaded with each axis changed, with the optimizer and without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_jobs import VOCAB, engine_of, export_model, new_folder, save, update
from family_configs import FAMILY_CONFIGS
from megatron_reference import OPTIMIZER, gather_hf_tensors, save_tiny_model
from ranks import run_on_ranks
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.reshard.families import families
from mrl.reshard.hf_export import copy_model_files
from mrl.reshard.spec import load_spec

# Learning rates do not tell a resumed optimizer from a new one: its moments and its count of steps have to.
CONSTANT_RATE = replace(OPTIMIZER, lr_warmup_steps=0)
# An Adam step moves a weight by up to lr = 5e-3; gradients differ by the rounding of another layout's sums.
TOLERANCE = 2e-5
# Without the moments of the first step the second one differs by as much as a step.
CLEARLY_OTHER = 1e-3

SAVED = {"tp": 2, "pp": 2, "sequence_parallel": True}
CHANGES: dict[str, dict[str, Any]] = {
    "none": SAVED,
    "tp": {"pp": 2},
    "pp": {"tp": 2, "sequence_parallel": True},
    "vpp": {**SAVED, "vpp": 2},
}
"""Data-parallel ranks make up for what an axis leaves of the four."""


@dataclass(kw_only=True)
class Step:
    """What an update returned, and the weights after it under their Hugging Face names (on rank 0)."""

    metrics: dict[str, float]
    weights: dict[str, Tensor]

    def difference(self, other: Step) -> float:
        """The largest of weights, and of metrics relative to those above 1; 0.0 is bitwise equality."""
        assert self.metrics.keys() == other.metrics.keys()
        weights = [(self.weights[name] - other.weights[name]).abs().max() for name in self.weights]
        pairs = [(value, other.metrics[name]) for name, value in self.metrics.items()]
        metrics = [abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs]
        # Not Python's max, which may pass over NaN.
        return torch.tensor([*weights, *metrics], dtype=torch.float64).max().item()


@dataclass(kw_only=True)
class Resumed:
    """Differences of second steps in a changed layout, on rank 0."""

    with_optimizer: float
    """From the unbroken run's."""
    without_optimizer: float
    """From that of a fresh engine that begins with the saved weights."""
    apart: float
    """Of these two steps from one another."""
    saved_again: float
    """From the unbroken run's, in its own layout, from a checkpoint that the changed layout wrote of what it loaded."""


def layouts(family: str) -> dict[str, dict[str, Any]]:
    """By the axis that is changed; experts are dealt out over two ranks unless it is theirs."""
    if families()[family].experts is None:
        return CHANGES
    # Without either, experts have the replicas of all else, and no optimizer of their own.
    return {change: {**axes, "ep": 2} for change, axes in CHANGES.items()} | {
        "ep": SAVED,
        "tp, ep": {"pp": 2},
        "ep, etp": {**SAVED, "etp": 2},
        "pp, etp": {**CHANGES["pp"], "ep": 2, "etp": 2},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        family: save_tiny_model(
            folder / family, family, vocab_size=VOCAB, kv_heads=2, tied=config["tie_word_embeddings"]
        )
        for family, config in FAMILY_CONFIGS.items()
    }


def second_step(engine: MegatronEngine, model: str) -> Step:
    (metrics,) = update(engine, "actor", 1)
    return Step(metrics=metrics, weights=gather_hf_tensors(engine, load_spec(model)))


def build(model: str, axes: dict[str, Any]) -> MegatronEngine:
    return engine_of(model, "actor", axes, distributed=True, optimizer=CONSTANT_RATE)


def fresh_step(model: str, folder: Path, axes: dict[str, Any]) -> Step:
    """The second step of an engine that begins with the exported weights."""
    if dist.get_rank() == 0:
        copy_model_files(Path(model), Path(model), folder, dtype="float32")
    dist.barrier()
    engine = build(str(folder), axes)
    second = second_step(engine, model)
    engine.close()
    return second


def run_family(model: str, changes: dict[str, dict[str, Any]], folder: Path) -> dict[str, Resumed]:
    """A first step, saved, and the second one after a load in every layout and back."""
    unbroken = build(model, changes["none"])
    update(unbroken, "actor", 0)
    save(unbroken, new_folder(folder / "saved"))
    export_model(unbroken, new_folder(folder / "model"))
    second, fresh = second_step(unbroken, model), fresh_step(model, folder / "model", changes["none"])
    resumed = {}
    for change, axes in changes.items():
        engine = build(model, axes)
        engine.load_checkpoint(folder / "saved", ["model"])
        anew = second_step(engine, model)
        engine.load_checkpoint(folder / "saved")
        save(engine, new_folder(folder / change))
        continued = second_step(engine, model)
        engine.close()
        unbroken.load_checkpoint(folder / change)
        resumed[change] = Resumed(
            with_optimizer=continued.difference(second),
            without_optimizer=anew.difference(fresh),
            apart=anew.difference(continued),
            saved_again=second_step(unbroken, model).difference(second),
        )
    unbroken.close()
    return resumed


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_an_axis_may_change_between_a_save_and_a_load(models, tmp_path, family) -> None:
    results = run_on_ranks(partial(run_family, models[family], layouts(family), tmp_path), 4)[0]
    for change, resumed in results.items():
        tolerance = 0.0 if change == "none" else TOLERANCE
        assert resumed.with_optimizer <= tolerance, (change, resumed)
        assert resumed.without_optimizer <= tolerance, (change, resumed)
        assert resumed.apart > CLEARLY_OTHER, (change, resumed)
        assert resumed.saved_again == 0.0, (change, resumed)
