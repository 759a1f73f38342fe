"""Parts of the Megatron backend that need no ranks: metrics, random states, Adam."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mrl.backends.megatron.adam import FusedAdam
from mrl.backends.megatron.metrics import merge_ranks, reduce_micro_batches
from mrl.backends.megatron.model import is_expert_parameter, shift_expert
from mrl.backends.megatron.role_state import RoleState
from mrl.backends.megatron.rope import scaled_frequencies
from mrl.config.optim import OptimConfig
from mrl.reshard.spec import RopeScaling
from mrl.trainer.roles import TrainingLength, optimizer_settings
from mrl.types import Metric


def test_metrics_combine_as_declared_over_micro_batches_and_ranks() -> None:
    def metrics(loss: float, low: float, high: float) -> dict[str, Metric]:
        numbers = {"loss": (loss, "sum"), "low": (low, "min"), "high": (high, "max")}
        return {name: Metric(torch.tensor(value), how) for name, (value, how) in numbers.items()}

    first = reduce_micro_batches([metrics(0.5, 2.0, 3.0), {}, metrics(0.25, -1.0, 7.0)])
    second = reduce_micro_batches([metrics(1.0, 0.0, 8.0)])
    assert merge_ranks([first, {}, second]) == {"loss": 1.75, "low": -1.0, "high": 8.0}


def test_metrics_declared_in_two_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="metric a is declared to be reduced by sum and by max"):
        reduce_micro_batches([{"a": Metric(torch.tensor(1.0))}, {"a": Metric(torch.tensor(1.0), "max")}])


def test_random_draws_of_a_role_are_its_own() -> None:
    def draw(state: RoleState) -> float:
        with state:
            return torch.rand(()).item()

    torch.manual_seed(0)
    alone = RoleState()
    expected = [draw(alone) for _ in range(3)]
    torch.manual_seed(0)
    one, other = RoleState(), RoleState()
    outside = torch.get_rng_state()
    drawn = []
    for _ in range(3):
        drawn.append(draw(one))
        draw(other)
    assert drawn == expected
    assert torch.equal(torch.get_rng_state(), outside)


def test_a_schedule_in_ppo_steps_becomes_one_in_optimizer_steps() -> None:
    length = TrainingLength(steps=100, updates_per_step=16)
    settings = optimizer_settings(OptimConfig(lr_warmup_steps=10, lr_decay_style="cosine"), length)
    assert (settings.lr_warmup_steps, settings.lr_decay_steps) == (160, 1600)
    settings = optimizer_settings(
        OptimConfig(lr_warmup_steps_ratio=0.1, total_training_steps=50, lr_decay_style="linear"), length
    )
    assert (settings.lr_warmup_steps, settings.lr_decay_steps) == (80, 800)


def test_a_warm_up_may_outlast_a_run_at_a_constant_rate() -> None:
    settings = optimizer_settings(OptimConfig(lr_warmup_steps=10), TrainingLength(steps=2, updates_per_step=4))
    assert (settings.lr_warmup_steps, settings.lr_decay_steps) == (40, None)
    with pytest.raises(ValueError, match=r"needs lr_decay_steps \(8\) greater than lr_warmup_steps \(40\)"):
        optimizer_settings(
            OptimConfig(lr_warmup_steps=10, lr_decay_style="linear"), TrainingLength(steps=2, updates_per_step=4)
        )


def test_expert_numbers_become_global_in_both_spellings() -> None:
    layer = "decoder.layers.7.mlp"
    assert shift_expert(f"{layer}.experts.local_experts.3.linear_fc1.weight", 4) == (
        f"{layer}.experts.local_experts.7.linear_fc1.weight"
    )
    assert shift_expert(f"{layer}.experts.linear_fc2.weight11", 4) == f"{layer}.experts.linear_fc2.weight15"
    for name in (f"{layer}.router.weight", f"{layer}.linear_fc1.weight", "decoder.layers.1.input_layernorm.weight"):
        assert shift_expert(name, 4) == name
        assert not is_expert_parameter(name)


@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 0.5, 3.0, 100)])
def test_scaled_frequencies_are_those_of_transformers(scaling) -> None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    values = dict(zip(names, scaling, strict=True))
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **values}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=64, rope_parameters=rope), torch.device("cpu"))
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    ours = scaled_frequencies(plain, RopeScaling(**values))
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    assert (ours < plain).any()
    assert (ours == plain).any()


@pytest.mark.parametrize(("decoupled", "torch_class"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_adam_equals_torch_and_counts_steps_in_the_group(decoupled, torch_class) -> None:
    ours = [torch.nn.Parameter(torch.linspace(-1, 1, 6)), torch.nn.Parameter(torch.ones(2, 2))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    adam, reference = FusedAdam(ours, adam_w_mode=decoupled, **settings), torch_class(theirs, **settings)
    for step in range(1, 4):
        for parameter, twin in zip(ours, theirs, strict=True):
            parameter.grad = torch.cos(parameter.detach() * step)
            twin.grad = parameter.grad.clone()
        adam.step()
        reference.step()
        # Same formulas in float32, in another order.
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        assert adam.param_groups[0]["step"] == step
        assert all("step" not in adam.state[parameter] for parameter in ours)
