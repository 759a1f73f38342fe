"""Checks of a role's Megatron section."""

from __future__ import annotations

import pytest

from mrl.config.errors import ConfigError
from mrl.config.megatron import MegatronConfig


@pytest.mark.parametrize("name", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_experts_are_on_one_rank_at_least(name: str) -> None:
    assert getattr(MegatronConfig(**{name: 4}), name) == 4
    with pytest.raises(ConfigError, match=f"{name} = 0 must be at least 1"):
        MegatronConfig(**{name: 0})
