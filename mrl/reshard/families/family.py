"""What a model family is, and which there are."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from mrl.reshard.families.config import Config
from mrl.reshard.families.tables import Part
from mrl.reshard.spec import ModelSpec


@dataclass(kw_only=True, frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture of experts."""

    module: str
    """In a layer; its router is "<module>.gate", its experts are "<module>.experts.<number>"."""
    gate: str
    up: str
    down: str


@dataclass(kw_only=True, frozen=True)
class Family:
    """Models that share a Hugging Face `model_type`."""

    model_type: str
    """SGLang's module of this name holds its class."""
    architecture: str
    """Class of the causal language model, in transformers and in SGLang."""
    read: Callable[[Config], ModelSpec]
    """A parsed config.json -> the spec; ValueError names a field that cannot be honoured."""
    layer: Callable[[ModelSpec], list[Part]]
    """The parts of every layer."""
    experts: ExpertNames | None = None
    """Of a family with a mixture of experts."""


@functools.cache
def families() -> Mapping[str, Family]:
    """Every family by `model_type`: the modules of this package that define FAMILY."""
    found = {}
    for _, name, _ in pkgutil.iter_modules([str(Path(__file__).parent)]):
        family = getattr(import_module(f"{__package__}.{name}"), "FAMILY", None)
        if family is not None:
            found[family.model_type] = family
    return found
