"""Shapes of models, without their weights: a folder, a config.json, or one of a few known by name."""

from __future__ import annotations

import json
from pathlib import Path

from mrl.reshard.families import spec_from_config
from mrl.reshard.spec import ModelSpec

_KNOWN = Path(__file__).parent / "models"
"""Each the fields of a published config.json that say something of the shape."""


def known_shapes() -> list[str]:
    """Names that `load_shape` takes."""
    return sorted(path.stem for path in _KNOWN.glob("*.json"))


def load_shape(model: str) -> ModelSpec:
    """The spec of a known name, a config.json, or a folder that holds one.

    Raises:
        ValueError: none of these, or a model that is not supported.
    """
    known = _KNOWN / f"{model}.json"
    path = Path(model).expanduser()
    found = known if model in known_shapes() else path / "config.json" if path.is_dir() else path
    if not found.is_file():
        raise ValueError(
            f"--model {model} is neither a folder with a config.json, nor such a file, nor one of "
            f"{', '.join(known_shapes())}"
        )
    try:
        return spec_from_config(json.loads(found.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{found} is not JSON: {error}") from error
