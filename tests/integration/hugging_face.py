"""Models of transformers as their checkpoints name them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel


def checkpoint_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the model's tensors under their names in a checkpoint: in memory transformers fuses experts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")
