"""Experts as the engine chooses and reports them, and the trainer made to choose them too, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sglang_jobs as jobs
import torch
from forced_experts import EXPERTS, LAYERS, ForcedReference, batch_with_experts
from megatron_cases import check_against, run_case, run_reference
from megatron_reference import load_reference, save_tiny_model
from ranks import run_on_ranks
from torch import Tensor

from mrl.backends.megatron.inputs import ContextPlace, packed_inputs, padded_inputs
from mrl.backends.megatron.model import Recompute
from mrl.backends.megatron.optimizer import DataParallelSettings
from mrl.backends.megatron.router_replay import ReplayingRouter, count_changed, spread_choices
from mrl.types import Generation, MicroBatchLimit, TrainBatch

VOCAB = 250
FEW_TOKENS = MicroBatchLimit(tokens=40)
DISTRIBUTED = DataParallelSettings(use_distributed_optimizer=True)
FULL, MOE = Recompute(granularity="full"), Recompute(granularity="selective", modules=("moe",))

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2 ep4 sp": ("qwen3_moe", {"tp": 2, "ep": 4, "sequence_parallel": True}, {}),
    "packed, by tokens: tp2 pp2 vpp2 sp, recomputed": (
        "qwen3_moe",
        {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
        {"packed": True, "limit": FEW_TOKENS, "recompute": FULL, "data_parallel": DISTRIBUTED},
    ),
    "shared sequences: tp2 cp2 ep2 sp, experts recomputed": (
        "qwen3_moe",
        {"tp": 2, "cp": 2, "ep": 2, "sequence_parallel": True},
        {"packed": True, "recompute": MOE},
    ),
    "pp4 ep2, block of recomputed layers": (
        "mixtral",
        {"pp": 4, "ep": 2},
        {"recompute": Recompute(granularity="full", method="block", num_layers=1)},
    ),
    "packed: pp2 vpp2 etp2 ep2": ("mixtral", {"pp": 2, "vpp": 2, "ep": 2, "etp": 2}, {"packed": True}),
}


def test_choices_are_spread_over_positions_as_worked_by_hand() -> None:
    # Two samples of 3 and 1 tokens, one layer, one expert; nothing is known of each one's last token.
    lengths = torch.tensor([3, 1])
    tokens = torch.tensor([[5, 6, 7], [8, 0, 0]])
    batch = TrainBatch(tokens=tokens, lengths=lengths, loss_mask=tokens > 0)
    experts = [torch.tensor([[1], [2]], dtype=torch.uint8), torch.empty(0, 1, dtype=torch.uint8)]
    padded = spread_choices(padded_inputs(batch), experts)
    assert padded[..., 0].tolist() == [[1, -1], [2, -1], [-1, -1]]
    packed = spread_choices(packed_inputs(batch, multiple=3), experts)
    assert packed[:, 0, 0].tolist() == [1, 2, -1, -1, -1, -1]
    # Padded to 4 tokens each; ranks have chunks 0 and 3, and 1 and 2.
    shares = [packed_inputs(batch, place=ContextPlace(rank=rank, size=2)) for rank in range(2)]
    assert [spread_choices(share, experts)[:, 0, 0].tolist() for share in shares] == [[1, -1, -1, -1], [2, -1, -1, -1]]


def test_choices_that_a_router_would_not_have_made_are_counted() -> None:
    own = torch.tensor([[3, 1], [0, 2], [4, 5]])
    given = torch.tensor([[1, 3], [2, 7], [-1, -1]], dtype=torch.int16)
    assert count_changed(given, own).tolist() == [1, 4]


def test_recomputed_layers_choose_again_what_they_were_given() -> None:
    router, scores = ReplayingRouter(), torch.rand(2, 4)

    def choose() -> list[list[int]]:
        return router.get_replay_topk(scores, 1, default_compute_topk=lambda *_: scores.topk(1))[1].tolist()

    own = scores.topk(1).indices.tolist()
    assert choose() == own
    router.begin(with_backward=True)
    given = [torch.full((2, 1), number, dtype=torch.int16) for number in (3, 1, 2)]
    for choices in given[:2]:
        router.choices = choices
        with torch.no_grad():
            assert choose() == choices.tolist()
    # Not recomputed later: its graph is kept.
    router.choices = given[2]
    assert choose() == given[2].tolist()
    router.choices = None
    assert [choose(), choose()] == [given[0].tolist(), given[1].tolist()]
    router.end()
    assert choose() == own


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        family: save_tiny_model(folder / family, family, vocab_size=VOCAB, kv_heads=4, layers=LAYERS)
        for family in EXPERTS
    }


def test_every_layout_computes_what_forced_transformers_do(models) -> None:
    batches = {family: [batch_with_experts(VOCAB, family, seed=seed) for seed in range(2)] for family in EXPERTS}

    def references() -> dict[str, tuple[Any, ...]]:
        forced = {family: ForcedReference(load_reference(path).model) for family, path in models.items()}
        return {family: run_reference(reference, batches[family]) for family, reference in forced.items()}

    def run_all() -> list[tuple[Any, ...]]:
        return [
            run_case(models[family], batches[family], layout, {"router_replay": True, **options})
            for family, layout, options in CASES.values()
        ]

    expected = run_on_ranks(references, 1)[0]
    by_rank = run_on_ranks(run_all, 8)
    for number, (case, (family, _, _)) in enumerate(CASES.items()):
        log_probs, log, weights = by_rank[0][number]
        experts, k = EXPERTS[family]
        for metrics in log:
            # A random expert is among the router's own with probability k / experts.
            assert metrics.pop("router_replay_changed_fraction") == pytest.approx(1 - k / experts, abs=0.1), case
        check_against(expected[family], (log_probs, log, weights), case)


def chosen_by_transformers(model: Any, prompt: list[int], response: list[int], k: int) -> Tensor:
    """[prompt + response - 1, layers, k], sorted by number."""
    tokens = torch.tensor([[*prompt, *response][:-1]])
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    return torch.stack([each.topk(k).indices.sort().values for each in logits], dim=1)


def reported(generation: Generation, k: int) -> Tensor:
    """The same, as the engine says."""
    assert generation.routed_experts is not None
    return generation.routed_experts.view(-1, LAYERS, k).long().sort().values


@pytest.mark.engine
@pytest.mark.parametrize(("family", "tp_size"), [("mixtral", 1), ("qwen3_moe", 2)])
def test_an_engine_reports_the_experts_that_transformers_choose(models, family, tp_size) -> None:
    # The second has the first as its prefix, whose keys and values, and experts, the engine has kept.
    prompts = [[3, 100, 199, 150, 151, 20], [3, 100, 199, 150, 151, 20, 21, 22, 23], [42]]
    k = EXPERTS[family][1]

    def job() -> None:
        reporting = {"enable_return_routed_experts": True, "chunked_prefill_size": 256}
        trained = jobs.TrainedEngine(Path(models[family]), tp_size=tp_size, context_length=60, engine_kwargs=reporting)
        params = jobs.sampling(7, return_routed_experts=True)
        queue = list(enumerate(prompts))
        at_once = trained.engine.generate(prompts, params)
        streamed = trained.engine.generate_from(lambda free: [queue.pop(0)] if queue else [], params, window=1)
        again = trained.engine.generate(prompts[1:2], params)
        for prompt, generation in zip(prompts * 2 + prompts[1:2], [*at_once, *streamed.values(), *again], strict=True):
            expected = chosen_by_transformers(trained.model, prompt, list(generation.response_ids), k)
            torch.testing.assert_close(reported(generation, k), expected)
        [silent] = trained.engine.generate([[42]], jobs.sampling(2))
        assert silent.routed_experts is None

    jobs.in_own_process(job)


@pytest.mark.engine
def test_an_engine_that_was_not_started_for_it_says_so(models) -> None:
    def job() -> tuple[str, str, float]:
        engine = jobs.TrainedEngine(Path(models["mixtral"]), tp_size=1, context_length=60).engine
        return jobs.error_of(lambda: engine.generate([[42]], jobs.sampling(2, return_routed_experts=True)))

    kind, message, _ = jobs.in_own_process(job)
    assert kind == "EngineError"
    assert "enable_return_routed_experts=True" in message
