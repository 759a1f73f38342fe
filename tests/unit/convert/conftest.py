"""A small model of every family, and the commands as a user gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_configs import FAMILY_CONFIGS
from safetensors.torch import save_file

from mrl.convert.command import main
from mrl.reshard.families import spec_from_config
from mrl.reshard.synthetic import distinct_state

Convert = Callable[..., int]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bfloat16 Hugging Face folder per family; elements are distinct and finite."""
    return {family: _save_model(tmp_path_factory.mktemp(family), config) for family, config in FAMILY_CONFIGS.items()}


@pytest.fixture(scope="session")
def convert() -> Convert:
    """`mrl convert` with paths or text as arguments; returns the exit status."""
    return lambda *arguments: main([*map(str, arguments), "--quiet"])


@pytest.fixture(scope="session")
def converted(models: dict[str, Path], convert: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the qwen2 model, of four files."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert convert("hf2megatron", "--hf", models["qwen2"], "--out", folder, "--tp", 2, "--pp", 2) == 0
    return folder


def _save_model(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    state = distinct_state(spec_from_config(config), torch.bfloat16)
    # Below the exponent of infinities.
    finite = {name: (tensor.view(torch.int16) & 0x3FFF).view(torch.bfloat16) for name, tensor in state.items()}
    save_file(finite, folder / "model.safetensors")
    return folder
