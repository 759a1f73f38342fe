"""Types of weights by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mrl.convert.errors import ConvertError
from mrl.convert.weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a conversion can write."""


def name_of(dtype: torch.dtype) -> str:
    """Torch's name without its prefix: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def one_dtype(weights: Weights, names: Iterable[str]) -> torch.dtype:
    """The type that all these tensors have.

    Raises:
        ConvertError: they differ, or it is none that models are trained in.
    """
    first: dict[torch.dtype, str] = {}
    for name in names:
        first.setdefault(weights.tensors[name].dtype, name)
    if len(first) > 1:
        (one, name), (other, other_name) = list(first.items())[:2]
        raise ConvertError(
            f"{weights.path} has tensors of different types: {name} is {name_of(one)}, {other_name} is "
            f"{name_of(other)}; one type is written, and a parameter is made of several tensors: convert the model to "
            "one type first"
        )
    dtype = next(iter(first))
    if dtype not in DTYPES.values():
        raise ConvertError(f"{weights.path} has {name_of(dtype)} weights; supported are {', '.join(DTYPES)}")
    return dtype
