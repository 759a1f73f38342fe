"""Checks of a role's Megatron section."""

from __future__ import annotations

import pytest

from mrl.config.errors import ConfigError
from mrl.config.megatron import MegatronConfig


def test_experts_are_not_cut() -> None:
    assert MegatronConfig(expert_tensor_parallel_size=1, expert_model_parallel_size=4).expert_model_parallel_size == 4
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size = 2 is not supported"):
        MegatronConfig(expert_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="expert_model_parallel_size"):
        MegatronConfig(expert_model_parallel_size=0)
