"""Weights from whatever folder a user names."""

from __future__ import annotations

from pathlib import Path

from mrl.convert.locate import find_role, is_checkpoint
from mrl.convert.megatron_weights import MegatronWeights
from mrl.convert.safetensors_files import SafetensorsFolder
from mrl.convert.weights import Weights
from mrl.reshard.spec import ModelSpec


def open_weights(path: str | Path, spec: ModelSpec) -> Weights:
    """The weights of a Hugging Face folder or of a checkpoint, under their Hugging Face names.

    Raises:
        ValueError: the folder holds neither, or a file of it is damaged.
    """
    path = Path(path).expanduser()
    return MegatronWeights(find_role(path).dist, spec) if is_checkpoint(path) else SafetensorsFolder(path)
