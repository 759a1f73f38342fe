"""Several roles in one process, the critic, the frozen reference, and bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_reference import (
    HIDDEN,
    OPTIMIZER,
    TEMPERATURE,
    gather_hf_tensors,
    load_reference,
    make_batch,
    policy_loss,
    save_tiny_model,
    value_loss,
)
from ranks import run_on_ranks

from mrl.backends.megatron import engine as megatron_engine
from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.outputs import log_prob_output
from mrl.backends.megatron.role_state import parallel_state
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit, TrainBatch

VOCAB = 250
PAIRS = MicroBatchLimit(samples=2)
HEAD_STD, HEAD_SEED = 0.05, 3
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        "qwen2": save_tiny_model(folder / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4),
        "llama": save_tiny_model(folder / "llama", "llama", vocab_size=VOCAB, kv_heads=2, tied=True, sharded=True),
    }


def mini_batches() -> list[TrainBatch]:
    return [make_batch(VOCAB, 10, seed=seed) for seed in range(2)]


def build(kind: str, path: str, layout: dict[str, Any], **options: Any) -> MegatronEngine:
    return build_engine(
        RoleSetup(
            kind=kind,  # type: ignore[arg-type]
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=dist.get_world_size(), **layout),
            temperature=TEMPERATURE,
            optimizer=None if kind == "reference" else OPTIMIZER,
            seed=HEAD_SEED,
            value_head_std=HEAD_STD,
            **options,
        )
    )


def build_actor(models: dict[str, str]) -> MegatronEngine:
    return build("actor", models["qwen2"], {"tp": 2, "pp": 2, "sequence_parallel": True}, data_parallel=DISTRIBUTED)


def build_critic(models: dict[str, str]) -> MegatronEngine:
    return build("critic", models["llama"], {"pp": 2}, recompute=Recompute(granularity="full"))


def run_role(engine: MegatronEngine, step: str, batch: TrainBatch) -> Any:
    """One operation: "log_probs", "values", "policy" or "value" update."""
    if step == "log_probs":
        return engine.compute_log_probs(batch, limit=PAIRS)
    if step == "values":
        return engine.compute_values(batch, limit=PAIRS)
    if step == "policy":
        return engine.update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)
    return engine.update(batch, value_loss(batch), limit=PAIRS)


STEPS = ("values", "log_probs", "value", "policy", "value", "log_probs", "policy", "values")
ACTOR_STEPS = ("log_probs", "policy")


def local_weights(engine: MegatronEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in engine.named_parameters()]


def run_alone(engine: MegatronEngine, steps: list[str]) -> tuple[list[Any], list[torch.Tensor]]:
    results = [run_role(engine, step, mini_batches()[number % 2]) for number, step in enumerate(steps)]
    weights = local_weights(engine)
    engine.close()
    return results, weights


def test_interleaved_roles_equal_each_alone_bitwise(models) -> None:
    def compare() -> None:
        alone = {
            "actor": run_alone(build_actor(models), [step for step in STEPS if step in ACTOR_STEPS]),
            "critic": run_alone(build_critic(models), [step for step in STEPS if step not in ACTOR_STEPS]),
        }
        engines = {"actor": build_actor(models), "critic": build_critic(models)}
        together: dict[str, list[Any]] = {"actor": [], "critic": []}
        for step in STEPS:
            name = "actor" if step in ACTOR_STEPS else "critic"
            batch = mini_batches()[len(together[name]) % 2]
            together[name].append(run_role(engines[name], step, batch))
            assert not parallel_state.model_parallel_is_initialized(), "a role's groups leaked out of its state"
        for name, (results, weights) in alone.items():
            torch.testing.assert_close(together[name], results, atol=0, rtol=0)
            torch.testing.assert_close(local_weights(engines[name]), weights, atol=0, rtol=0)

    run_on_ranks(compare, 8, timeout_s=280)


def run_critic_reference(path: str) -> tuple[torch.Tensor, list[dict[str, float]], torch.Tensor]:
    reference = load_reference(path)
    reference.head = torch.nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(HEAD_SEED)
        reference.head.weight.copy_(torch.randn(1, HIDDEN, generator=generator) * HEAD_STD)
        reference.head.bias.zero_()
        before = reference.outputs(mini_batches()[0])["values"]
    log = reference.train(mini_batches(), value_loss)
    with torch.no_grad():
        after = reference.outputs(mini_batches()[0])["values"]
    return before, log, after


CRITIC_LAYOUTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"tp": 4, "sequence_parallel": True}, {"data_parallel": DISTRIBUTED}),
    ({"tp": 2, "pp": 2, "vpp": 2}, {}),
    ({"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, {"packed": True}),
)


def test_critic_in_every_layout_trains_like_transformers(models) -> None:
    path = models["qwen2"]
    before, log, after = run_on_ranks(lambda: run_critic_reference(path), 1)[0]

    def run_all() -> list[tuple[torch.Tensor, list[dict[str, float]], torch.Tensor]]:
        results = []
        for layout, options in CRITIC_LAYOUTS:
            engine = build("critic", path, layout, **options)
            first = run_role(engine, "values", mini_batches()[0])
            updates = [run_role(engine, "value", batch) for batch in mini_batches()]
            results.append((first, updates, run_role(engine, "values", mini_batches()[0])))
            engine.close()
        return results

    for ours_before, ours_log, ours_after in run_on_ranks(run_all, 4)[0]:
        # Values of magnitude 1 in float32, then three Adam steps of rounding differences in the gradients.
        torch.testing.assert_close(ours_before, before, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours_after, after, atol=1e-4, rtol=0)
        for ours, theirs in zip(ours_log, log, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_reference_scores_like_transformers_and_exports_nothing_trained(models) -> None:
    batch = make_batch(VOCAB, 1, seed=9)

    def score() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # One sample for four ranks in an interleaved schedule: all but one micro-batch are fillers.
        engine = build("reference", models["llama"], {"pp": 2, "vpp": 2})
        log_probs = engine.compute_log_probs(batch, limit=MicroBatchLimit(samples=4))
        return log_probs, gather_hf_tensors(engine, load_spec(models["llama"]))

    def expected() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reference = load_reference(models["llama"])
        with torch.no_grad():
            return reference.outputs(batch)["log_probs"], dict(reference.model.state_dict())

    log_probs, weights = run_on_ranks(expected, 1)[0]
    by_rank = run_on_ranks(score, 4)
    for ours, _ in by_rank:
        torch.testing.assert_close(ours, log_probs, atol=1e-5, rtol=0)
    for name, tensor in by_rank[0][1].items():
        assert torch.equal(tensor, weights[name]), name


def test_one_sample_over_many_ranks_updates_like_one_rank(models) -> None:
    batch = make_batch(VOCAB, 1, seed=4)

    def update(layout: dict[str, Any]) -> dict[str, float]:
        return run_role(build("actor", models["qwen2"], layout), "policy", batch)

    alone = run_on_ranks(lambda: update({}), 1)[0]
    for ours in run_on_ranks(lambda: update({"pp": 2, "vpp": 2}), 4):
        assert ours == pytest.approx(alone, rel=2e-5)


def test_bfloat16_stays_close_to_float32(models, monkeypatch) -> None:
    batch = mini_batches()[0]
    dtypes = set()

    def note(logits: torch.Tensor, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        dtypes.add(logits.dtype)
        return log_prob_output(logits, *args, **options)

    monkeypatch.setattr(megatron_engine, "log_prob_output", note)

    def run() -> tuple[list[Any], set[torch.dtype]]:
        results = []
        for options in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "data_parallel": DISTRIBUTED}):
            engine = build("actor", models["qwen2"], {"tp": 2, "pp": 2}, **options)
            log_probs = run_role(engine, "log_probs", batch)
            results.append((log_probs, [run_role(engine, "policy", batch) for _ in range(2)]))
            engine.close()
        return results, dtypes

    ranks = run_on_ranks(run, 4)
    # A float32 copy of all logits would take twice their memory, and as much again for its gradient.
    assert set().union(*(seen for _, seen in ranks)) == {torch.float32, torch.bfloat16}
    single, *halves = ranks[0][0]
    for log_probs, updates in halves:
        # 8 bits of mantissa through 4 layers; a wrong shard or a lost master copy is off by more than 1.
        assert (log_probs - single[0]).abs().max() < 0.3
        for ours, theirs in zip(updates, single[1], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
