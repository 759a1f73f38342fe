"""Vocab-parallel log-probs and entropy against torch's own log_softmax and autograd over the whole vocabulary."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.ops import vocab_reference
from mrl.parallel.vocab_parallel import (
    vocab_parallel_log_probs,
    vocab_parallel_log_probs_and_entropy,
)

VOCAB_SIZE, PADDED_SIZE = 37, 48
TEMPERATURE = 0.7
# Sums over 37 float32 terms of size one: a few rounding steps of 6e-8, times the values' size of up to 10.
TOLERANCE = 2e-6


def run_on_gloo(work: Callable[[int], Any], world_size: int) -> list[Any]:
    """`work(rank)` in forked ranks joined by a gloo group; results (no tensors) in rank order."""

    def rank_main(env: RankEnvironment) -> Any:
        torch.set_num_threads(1)
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        try:
            return work(env.rank)
        finally:
            dist.destroy_process_group()

    return run_ranks(rank_main, world_size, timeout_s=60)


def make_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with loud padding columns, targets that touch every shard, and weights of the two results."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, PADDED_SIZE, generator=generator)).to(dtype)
    logits[..., VOCAB_SIZE:] = 50.0
    targets = torch.randint(0, VOCAB_SIZE, (3, 5), generator=generator)
    targets[0, :3] = torch.tensor([0, VOCAB_SIZE - 1, PADDED_SIZE // 2])
    return logits, targets, torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)


def reference(
    logits: torch.Tensor, targets: torch.Tensor, log_prob_weight: torch.Tensor, entropy_weight: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs, entropy and the gradient of their weighted sum, in float64 over the whole vocabulary."""
    leaf = logits.double().requires_grad_()
    log_softmax = (leaf[..., :VOCAB_SIZE] / TEMPERATURE).log_softmax(-1)
    log_probs = log_softmax.gather(-1, targets[..., None])[..., 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    ((log_prob_weight * log_probs).sum() + (entropy_weight * entropy).sum()).backward()
    assert leaf.grad is not None
    return log_probs.detach().numpy(), entropy.detach().numpy(), leaf.grad.numpy()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_log_softmax_over_the_whole_vocabulary(tp_size: int, dtype: torch.dtype) -> None:
    logits, targets, log_prob_weight, entropy_weight = make_case(dtype)

    def work(rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard = logits.chunk(tp_size, -1)[rank].clone().requires_grad_()
        before = shard.detach().clone()
        log_probs, entropy = vocab_parallel_log_probs_and_entropy(
            shard, targets, tp_group=dist.group.WORLD, vocab_size=VOCAB_SIZE, temperature=TEMPERATURE
        )
        ((log_prob_weight * log_probs).sum() + (entropy_weight * entropy).sum()).backward()
        assert torch.equal(shard.detach(), before)
        assert log_probs.dtype == entropy.dtype == torch.float32
        assert shard.grad is not None
        assert shard.grad.dtype == dtype
        return log_probs.detach().numpy(), entropy.detach().numpy(), shard.grad.float().numpy()

    results = run_on_gloo(work, tp_size)
    log_probs, entropy, gradient = reference(logits, targets, log_prob_weight, entropy_weight)
    for result in results:
        # Ranks that disagreed in the last bit would compute different losses.
        assert np.array_equal(result[0], results[0][0])
        assert np.array_equal(result[1], results[0][1])
        np.testing.assert_allclose(result[0], log_probs, atol=TOLERANCE)
        np.testing.assert_allclose(result[1], entropy, atol=TOLERANCE)
    # The gradient is rounded once to the logits' dtype: half a unit in the last of bfloat16's 8 bits.
    rtol = 2**-8 if dtype == torch.bfloat16 else 0.0
    np.testing.assert_allclose(
        np.concatenate([result[2] for result in results], -1), gradient, rtol=rtol, atol=TOLERANCE
    )


def test_a_rank_that_holds_only_padding_takes_part() -> None:
    logits, targets, *_ = make_case()
    logits, targets = logits[..., :20], targets % 5

    def work(rank: int) -> tuple[np.ndarray, np.ndarray]:
        shard = logits.chunk(4, -1)[rank].clone().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs_and_entropy(
            shard, targets, tp_group=dist.group.WORLD, vocab_size=5
        )
        (log_probs.sum() + entropy.sum()).backward()
        assert shard.grad is not None
        return log_probs.detach().numpy(), shard.grad.numpy()

    results = run_on_gloo(work, 4)
    expected = logits[..., :5].log_softmax(-1).gather(-1, targets[..., None])[..., 0].numpy()
    for log_probs, _ in results:
        np.testing.assert_allclose(log_probs, expected, atol=TOLERANCE)
    assert np.abs(results[0][1]).max() > 0.1
    assert all((gradient == 0).all() for _, gradient in results[1:])


def test_hand_worked_case() -> None:
    # Odds 1 : 2 : 5 at temperature 2, so logits are twice their logarithms.
    odds = torch.tensor([1.0, 2.0, 5.0])
    logits = (2 * odds.log()).expand(1, 3, 3)
    targets = torch.tensor([[0, 1, 2]])
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(
        logits, targets, tp_group=None, vocab_size=3, temperature=2.0
    )
    expected = [math.log(1 / 8), math.log(1 / 4), math.log(5 / 8)]
    assert log_probs[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert entropy[0, 0].item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 1 / 4, 5 / 8)), abs=1e-6)
    # d log p(0) / d logit = (one-hot - p) / temperature
    leaf = logits[:, :1].clone().requires_grad_()
    vocab_parallel_log_probs(leaf, targets[:, :1], tp_group=None, vocab_size=3, temperature=2.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[0, 0].tolist() == pytest.approx([7 / 16, -1 / 8, -5 / 16], abs=1e-6)


def test_gradients_equal_central_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (2, 3), generator=generator)
    weights = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    step = 1e-5
    for first, second in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):

        def total(leaf: torch.Tensor, first: float = first, second: float = second) -> torch.Tensor:
            log_probs, entropy = vocab_parallel_log_probs_and_entropy(
                leaf, targets, tp_group=None, vocab_size=5, temperature=0.8
            )
            return (first * weights[0] * log_probs + second * weights[1] * entropy).sum()

        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
        for index in range(logits.numel()):
            shift = torch.zeros(logits.numel(), dtype=torch.float64)
            shift[index] = step
            slope = (total(logits + shift.view_as(logits)) - total(logits - shift.view_as(logits))) / (2 * step)
            # Truncation step^2 = 1e-10 and rounding 1e-16 / step = 1e-11.
            assert gradient.flatten()[index].item() == pytest.approx(slope.item(), abs=1e-8)


def test_slicing_over_tokens_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, log_prob_weight, entropy_weight = make_case()

    def compute() -> tuple[torch.Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs_and_entropy(
            leaf, targets, tp_group=None, vocab_size=VOCAB_SIZE, temperature=TEMPERATURE
        )
        ((log_prob_weight * log_probs).sum() + (entropy_weight * entropy).sum()).backward()
        assert leaf.grad is not None
        return log_probs.detach(), entropy.detach(), leaf.grad

    whole = compute()
    monkeypatch.setattr(vocab_reference, "_SLICE_ELEMENTS", 2 * 3 * PADDED_SIZE)
    for one, other in zip(whole, compute(), strict=True):
        # Vectorised sums may group a row's terms differently.
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


class LargestFloat32(TorchFunctionMode):
    """Notes the element count of the largest float32 tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


def test_no_grad_pass_makes_no_float32_copy_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_reference, "_SLICE_ELEMENTS", 4096)
    logits = torch.randn(1, 256, 512).bfloat16()
    targets = torch.zeros(1, 256, dtype=torch.long)
    with torch.no_grad(), LargestFloat32() as largest:
        vocab_parallel_log_probs(logits, targets, tp_group=None, vocab_size=512)
    assert largest.numel == 4096


def test_transposed_and_packed_logits_give_the_same_result() -> None:
    logits, targets, *_ = make_case()
    expected = vocab_parallel_log_probs(logits, targets, tp_group=None, vocab_size=VOCAB_SIZE)
    sequence_first = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(
        vocab_parallel_log_probs(sequence_first, targets, tp_group=None, vocab_size=VOCAB_SIZE), expected
    )
    packed = vocab_parallel_log_probs(logits.flatten(0, 1), targets.flatten(), tp_group=None, vocab_size=VOCAB_SIZE)
    assert torch.equal(packed, expected.flatten())


def test_the_gradient_lies_in_the_logits_memory_only_if_asked_for() -> None:
    logits, targets, *_ = make_case(torch.bfloat16)
    gradients, aliases = [], []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs_and_entropy(
            leaf, targets, tp_group=None, vocab_size=VOCAB_SIZE, inplace_backward=inplace
        )
        (2 * log_probs + entropy).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        aliases.append(leaf.grad.data_ptr() == leaf.data_ptr())
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0.1
    assert aliases == [False, True]


def test_overwritten_logits_cannot_be_used_unnoticed() -> None:
    logits, targets, *_ = make_case()
    leaf = logits.requires_grad_()
    scaled = leaf * 2
    also_needs_them = scaled.square().sum()
    log_probs = vocab_parallel_log_probs(
        scaled, targets, tp_group=None, vocab_size=VOCAB_SIZE, inplace_backward=True
    ).sum()
    log_probs.backward(retain_graph=True)
    for late in (also_needs_them, log_probs):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_large_common_offsets_cost_no_precision() -> None:
    logits, targets, *_ = make_case()
    # Multiples of 1/64 stay exact under the offset.
    logits = (logits * 64).round() / 64
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(logits, targets, tp_group=None, vocab_size=VOCAB_SIZE)
    far = vocab_parallel_log_probs_and_entropy(logits + 65536, targets, tp_group=None, vocab_size=VOCAB_SIZE)
    assert torch.equal(far[0], log_probs)
    assert torch.equal(far[1], entropy)


def test_target_outside_the_vocabulary_is_nan_not_a_number_that_looks_right() -> None:
    logits, targets, *_ = make_case()
    targets[1, 1], targets[2, 2] = VOCAB_SIZE, -100
    log_probs = vocab_parallel_log_probs(logits, targets, tp_group=None, vocab_size=VOCAB_SIZE)
    assert log_probs.isnan().nonzero().tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"vocab_size": PADDED_SIZE + 1}, "vocab_size = 49"),
        ({"logits": torch.zeros(1, 1, PADDED_SIZE).expand(3, 5, -1), "inplace_backward": True}, "share memory"),
        ({"targets": torch.zeros(3, 4, dtype=torch.long)}, "targets"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    logits, targets, *_ = make_case()
    arguments = {"logits": logits, "targets": targets, "tp_group": None, "vocab_size": VOCAB_SIZE, **change}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs(**arguments)
