"""The bound objectives: their parts, and that no split of a mini-batch changes loss, gradient or metrics."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl.algorithms.aggregation import LOSS_AGG_MODES, LossNorm, aggregate_loss
from mrl.algorithms.kl import compute_kl
from mrl.algorithms.objectives import LossFn, PolicyObjective, ValueObjective
from mrl.algorithms.policy_losses.vanilla import Vanilla
from mrl.types import Metric, TrainBatch

NUM_SAMPLES, WIDTH = 8, 6
FULL = PolicyObjective(
    policy_loss=Vanilla(clip_ratio_low=0.2, clip_ratio_high=0.28),
    entropy_coeff=0.01,
    use_kl_loss=True,
    kl_loss_coef=0.1,
    loss_scale_factor=6.0,
)


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(NUM_SAMPLES, WIDTH, generator=generator, dtype=dtype)

    mask = torch.rand(NUM_SAMPLES, WIDTH, generator=generator) < 0.6
    mask[1], mask[0, 0] = False, True
    return TrainBatch(
        tokens=torch.zeros(NUM_SAMPLES, WIDTH, dtype=torch.long),
        lengths=torch.full((NUM_SAMPLES,), WIDTH),
        loss_mask=mask,
        old_log_probs=draw(),
        ref_log_probs=draw(),
        values=draw(),
        advantages=draw(),
        returns=draw(),
    )


def make_output(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, NUM_SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return {name: drawn[i].clone().requires_grad_() for i, name in enumerate(("log_probs", "entropy", "values"))}


def accumulate(
    loss_fn: LossFn, output: dict[str, torch.Tensor], batch: TrainBatch, parts: list[list[int]]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, metrics and gradients as an engine would gather them from micro-batches."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in output.items()}
    total, metrics = 0.0, {}
    for part in parts:
        loss, shares = loss_fn({name: leaf[part] for name, leaf in leaves.items()}, batch.select(part))
        loss.backward()
        total += loss.item()
        for name, share in shares.items():
            metrics.setdefault(name, []).append(share)
    gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves.values()]
    return total, {name: combine(shares) for name, shares in metrics.items()}, gradients


def combine(shares: list[Metric]) -> float:
    values = [share.value.item() for share in shares]
    return {"sum": sum, "max": max, "min": min}[shares[0].reduction](values)


def policy_of(mode: str) -> Callable[[TrainBatch], LossFn]:
    return replace(FULL, loss_agg_mode=mode).bind


def value_of(mode: str) -> Callable[[TrainBatch], LossFn]:
    return ValueObjective(loss_agg_mode=mode, loss_scale_factor=6.0).bind


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(LOSS_AGG_MODES),
    bind_of=st.sampled_from([policy_of, value_of]),
    owner=st.lists(st.integers(0, 3), min_size=NUM_SAMPLES, max_size=NUM_SAMPLES),
)
def test_no_split_changes_loss_gradient_or_metrics(
    seed: int, mode: str, bind_of: Callable[[str], Callable[[TrainBatch], LossFn]], owner: list[int]
) -> None:
    batch, output = make_batch(seed), make_output(seed + 1)
    loss_fn = bind_of(mode)(batch)
    parts = [[index for index in range(NUM_SAMPLES) if owner[index] == part] for part in range(4)]
    whole = accumulate(loss_fn, output, batch, [list(range(NUM_SAMPLES))])
    split = accumulate(loss_fn, output, batch, [part for part in parts if part])
    # Losses and gradients in float64; metrics are float32 by contract.
    assert split[0] == pytest.approx(whole[0], abs=1e-12)
    assert split[1] == pytest.approx(whole[1], abs=1e-5)
    for one, other in zip(split[2], whole[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_policy_loss_is_the_sum_of_its_weighted_parts() -> None:
    batch, output = make_batch(), make_output()
    loss, metrics = FULL.bind(batch)(output, batch)
    norm = LossNorm.of(batch.loss_mask)
    ratio = (output["log_probs"] - batch.old_log_probs).exp()
    surrogate = -torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages)
    surrogate = torch.where(batch.advantages < 0, surrogate.clamp(max=-3 * batch.advantages), surrogate)
    kl = compute_kl(output["log_probs"], batch.ref_log_probs, "low_var_kl")
    parts = [
        aggregate_loss(part, batch.loss_mask, "token-mean", norm).item() for part in (surrogate, output["entropy"], kl)
    ]
    assert loss.item() == pytest.approx(parts[0] - 0.01 * parts[1] + 0.1 * parts[2], abs=1e-12)
    named = [metrics[f"actor/{name}"].value.item() for name in ("pg_loss", "entropy", "kl_loss")]
    assert named == pytest.approx(parts, abs=1e-6)


def test_policy_metrics_by_hand() -> None:
    batch = TrainBatch(
        tokens=torch.zeros(2, 2, dtype=torch.long),
        lengths=torch.tensor([2, 2]),
        loss_mask=torch.tensor([[True, True], [True, False]]),
        old_log_probs=torch.zeros(2, 2),
        advantages=torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
    )
    log_probs = torch.tensor([[2.0, 4.0], [1.0, 64.0]]).log()
    loss, metrics = PolicyObjective(monitor_entropy=False).bind(batch)({"log_probs": log_probs}, batch)
    # Losses -1.2 (clipped), 3 (dual clip) and -1 over three tokens; the masked ratio 64 counts nowhere.
    assert loss.item() == pytest.approx(0.8 / 3)
    assert {name: metric.value.item() for name, metric in metrics.items()} == pytest.approx(
        {
            "actor/pg_loss": 0.8 / 3,
            "actor/kl": -(0.6931472 + 1.3862944 + 0.0) / 3,
            "actor/clip_fraction": 1 / 3,
            "actor/clip_fraction_lower": 1 / 3,
            "actor/ratio_mean": 7 / 3,
            "actor/ratio_max": 4.0,
        },
        abs=1e-6,
    )


def test_value_metrics_by_hand() -> None:
    batch = TrainBatch(
        tokens=torch.zeros(1, 3, dtype=torch.long),
        lengths=torch.tensor([3]),
        loss_mask=torch.tensor([[True, True, False]]),
        values=torch.zeros(1, 3),
        returns=torch.tensor([[2.0, 1.0, 50.0]]),
    )
    loss, metrics = ValueObjective().bind(batch)({"values": torch.tensor([[1.0, 0.2, 9.0]])}, batch)
    # Errors 1.5 (kept at 0.5, clipped) and 0.8: half of (2.25 + 0.64) / 2.
    assert loss.item() == pytest.approx(0.7225)
    assert {name: metric.value.item() for name, metric in metrics.items()} == pytest.approx(
        {"critic/clip_fraction": 0.5, "critic/value_mean": 0.6, "critic/return_mean": 1.5}
    )


def test_metrics_survive_a_schedule_that_divides_the_loss_in_place() -> None:
    batch = make_batch(dtype=torch.float32)
    output = {name: tensor.detach().float() for name, tensor in make_output().items()}
    with torch.no_grad():
        loss, metrics = PolicyObjective(monitor_entropy=False).bind(batch)(output, batch)
        before = {name: metric.value.item() for name, metric in metrics.items()}
        loss /= 8
    assert {name: metric.value.item() for name, metric in metrics.items()} == before
    assert all(metric.value.dtype == torch.float32 and metric.value.dim() == 0 for metric in metrics.values())


def test_entropy_is_asked_for_only_where_it_is_used() -> None:
    assert PolicyObjective().needs_entropy
    assert PolicyObjective(monitor_entropy=False, entropy_coeff=0.01).needs_entropy
    assert not PolicyObjective(monitor_entropy=False).needs_entropy
    batch, output = make_batch(), make_output()
    loss, metrics = PolicyObjective().bind(batch)(output, batch)
    loss.backward()
    assert "actor/entropy" in metrics
    assert output["entropy"].grad is None


def test_missing_fields_and_wrong_settings_are_named() -> None:
    batch, output = make_batch(), make_output()
    with pytest.raises(ValueError, match=r"TrainBatch\.ref_log_probs is needed"):
        FULL.bind(batch)(output, replace(batch, ref_log_probs=None))
    with pytest.raises(ValueError, match="loss_scale_factor = None"):
        PolicyObjective(loss_agg_mode="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="unknown KL estimate 'k4'"):
        PolicyObjective(kl_loss_type="k4")
