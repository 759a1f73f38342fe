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
from mrl.backends.megatron.inputs import ContextPlace, packed_inputs, padded_inputs
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


def test_shared_inputs_hand_worked_case() -> None:
    batch = batch_of([5, 6, 7, 8, 9], [8], [9, 4])
    first, second = (packed_inputs(batch, multiple=2, place=ContextPlace(rank=rank, size=2)) for rank in range(2))
    # Padded to 8 + 4 + 4 tokens, a multiple of 2 x 2; ranks have chunks 0 and 3, and 1 and 2, of each sequence.
    assert first.tokens.tolist() == [[5, 6, 0, 0, 8, 0, 9, 0]]
    assert second.tokens.tolist() == [[7, 8, 9, 0, 0, 0, 4, 0]]
    assert first.positions.tolist() == [[0, 1, 6, 7, 0, 3, 0, 3]]
    assert second.positions.tolist() == [[2, 3, 4, 5, 1, 2, 1, 2]]
    assert first.packed is not None
    assert first.packed.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert first.targets[0, [0, 1, 6]].tolist() == [6, 7, 4]
    assert second.targets[0, [0, 1]].tolist() == [8, 9]
    assert first.align(torch.arange(10.0, 18.0)).tolist() == [[0, 10, 11, 0, 0], [0] * 5, [0, 16, 0, 0, 0]]
    assert second.align(torch.arange(20.0, 28.0)).tolist() == [[0, 0, 0, 20, 21], [0] * 5, [0] * 5]
    assert torch.cat([first.tokens, second.tokens], 1)[0, first.packed.restore].tolist() == [
        5, 6, 7, 8, 9, 0, 0, 0, 8, 0, 0, 0, 9, 4, 0, 0
    ]  # fmt: skip


def test_a_share_is_padded_for_sequence_parallelism() -> None:
    inputs = packed_inputs(batch_of([5, 6, 7]), multiple=4, place=ContextPlace(rank=1, size=2))
    assert inputs.tokens.shape == (1, 4)
    assert inputs.packed is not None
    assert inputs.packed.lengths == (4, 4)


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


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), cp=st.sampled_from([2, 3]))
def test_attention_of_shares_equals_that_of_whole_sequences(lengths: list[int], cp: int) -> None:
    batch = batch_of(*([1] * length for length in lengths))
    shares = [packed_inputs(batch, place=ContextPlace(rank=rank, size=cp)).packed for rank in range(cp)]
    assert shares[0] is not None
    generator, total = torch.Generator().manual_seed(0), sum(shares[0].lengths)
    query = torch.randn(total, 4, 3, generator=generator)
    key, value = (torch.randn(total, 2, 3, generator=generator) for _ in range(2))
    whole = attend_within(shares[0].lengths, query, key, value, scale=0.3)
    parts = [
        attend_within(each.lengths, query[each.share], key, value, scale=0.3, positions=each.positions[each.share])
        for each in shares
    ]
    torch.testing.assert_close(torch.cat(parts)[shares[0].restore], whole, atol=3e-6, rtol=0)


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
