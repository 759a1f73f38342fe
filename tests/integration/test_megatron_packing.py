"""Samples packed end to end: the parts by hand and against slow loops, and the gradients of padded samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_reference import OPTIMIZER, make_batch, policy_loss, save_tiny_model, value_loss
from ranks import run_on_ranks

from mrl.backends.megatron.attention import attend_within, split_runs
from mrl.backends.megatron.inputs import packed_inputs, padded_inputs
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit, TrainBatch

VOCAB = 250


def batch_of(*rows: list[int]) -> TrainBatch:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return TrainBatch(tokens=tokens, lengths=lengths, loss_mask=torch.arange(width) < lengths[:, None])


def test_packed_inputs_hand_worked_case() -> None:
    inputs = packed_inputs(batch_of([5, 6, 7], [8], [9, 4]), multiple=4)
    assert inputs.tokens.tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert inputs.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert inputs.packed is not None
    assert inputs.packed.cu_seqlens_q.tolist() == [0, 3, 4, 6, 8]
    assert inputs.packed.max_seqlen_q == 3
    # Position n predicts n + 1: the predictions at 0 and 1 are of sample 0, that at 4 of sample 2, the others of none.
    aligned = inputs.align(torch.arange(10.0, 18.0).unsqueeze(0))
    assert aligned.tolist() == [[0, 10, 11], [0, 0, 0], [0, 14, 0]]
    assert inputs.targets[0, [0, 1, 4]].tolist() == [6, 7, 4]


def test_padded_inputs_hand_worked_case() -> None:
    inputs = padded_inputs(batch_of([5, 6, 7], [8], [9, 4]))
    assert inputs.packed is None
    assert inputs.positions.tolist() == [[0, 1, 2]] * 3
    aligned = inputs.align(torch.arange(10.0, 19.0).view(3, 3))
    assert aligned.tolist() == [[0, 10, 11], [0, 0, 0], [0, 16, 0]]


def test_predictions_of_no_token_take_no_part_in_gradients_even_if_not_finite() -> None:
    inputs = packed_inputs(batch_of([5, 6, 7], [8]), multiple=2)
    predicted = torch.tensor([[1.0, 2.0, torch.nan, torch.inf]], requires_grad=True)
    inputs.align(predicted).sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_long_sequences_run_with_their_like_and_short_ones_together() -> None:
    assert split_runs([500, 300, 260, 200, 90, 64, 30, 1]) == [(500, 300, 260), (200,), (90, 64), (30, 1)]
    assert split_runs([64, 9, 1, 3]) == [(64, 9, 1, 3)]


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5), kv_heads=st.sampled_from([1, 2, 4]))
def test_attention_within_sequences_equals_a_loop_over_queries(lengths: list[int], kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total, heads, size, scale = sum(lengths), 4, 3, 0.3
    query = torch.randn(total, heads, size, generator=generator)
    key, value = (torch.randn(total, kv_heads, size, generator=generator) for _ in range(2))
    found = attend_within(lengths, query, key, value, scale=scale)
    start = 0
    for length in lengths:
        # The first, one inner and the last query of each sequence and every head, one after the other.
        for offset in {0, length // 2, length - 1}:
            keys, values = key[start : start + offset + 1], value[start : start + offset + 1]
            for head in range(heads):
                shared = head * kv_heads // heads
                scores = (keys[:, shared] @ query[start + offset, head] * scale).softmax(0)
                expected = scores @ values[:, shared]
                place = found[start + offset, head * size : (head + 1) * size]
                # Sums of up to 150 terms of size 1 in float32.
                torch.testing.assert_close(place, expected, atol=3e-6, rtol=0)
        start += length


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4)


def spread_batch() -> TrainBatch:
    """11 samples of 4 to 24 tokens."""
    batch = make_batch(VOCAB, 11, seed=3)
    lengths = torch.tensor([24, 4, 4, 5, 23, 6, 4, 18, 7, 4, 10])
    inside = torch.arange(24) < lengths[:, None]
    return batch.with_fields(tokens=batch.tokens * inside, lengths=lengths, loss_mask=inside & (torch.arange(24) >= 3))


def outputs_and_gradients(model: str, kind: Any, *, packed: bool, limit: MicroBatchLimit) -> Any:
    setup = RoleSetup(
        kind=kind,
        model_path=model,
        spec=load_spec(model),
        layout=ParallelLayout(world_size=4, tp=2, pp=2, vpp=2, sequence_parallel=True),
        optimizer=OPTIMIZER,
        packed=packed,
    )
    engine, batch = build_engine(setup), spread_batch()
    if kind == "critic":
        outputs = engine.compute_values(batch, limit=limit)
        metrics = engine.update(batch, value_loss(batch), limit=limit)
    else:
        outputs = engine.compute_log_probs(batch, limit=limit)
        metrics = engine.update(batch, policy_loss(batch), limit=limit, with_entropy=True)
    training = engine._parts.training
    assert training is not None
    gradients = [buffer.grad_data.clone() for module in training.modules for buffer in module.buffers]
    engine.close()
    return outputs, metrics, gradients


@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_padded_and_packed_compute_the_same(model, kind) -> None:
    def both() -> list[Any]:
        return [
            outputs_and_gradients(model, kind, packed=packed, limit=limit)
            for packed, limit in (
                (False, MicroBatchLimit(samples=3)),
                (True, MicroBatchLimit(samples=3)),
                (True, MicroBatchLimit(tokens=31)),
            )
        ]

    for padded, *others in run_on_ranks(both, 4):
        for packed in others:
            # Outputs of magnitude 6, losses and clipped gradients of at most 1: float32 rounding through 8 layers.
            torch.testing.assert_close(packed[0], padded[0], atol=1e-5, rtol=0)
            assert packed[1] == pytest.approx(padded[1], abs=2e-5, rel=2e-5)
            torch.testing.assert_close(packed[2], padded[2], atol=3e-6, rtol=0)
            assert max(gradient.abs().max() for gradient in packed[2]) > 1e-3
