"""Where every part of a parameter lies in the Hugging Face checkpoint, as boxes of rows and columns.

A tensor is seen as 2-D: [n] counts as [n, 1] (rows n, one column), [e, n, m] as [e * n, m] (the experts' rows, one
expert after the other). Layer and expert numbers in names are global.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) under which a parameter of 1 to 3 dimensions is addressed."""
    if len(shape) == 1:
        return shape[0], 1
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a Hugging Face tensor and where it lies in a local parameter. Units are elements."""

    tensor: str
    row: int
    col: int
    rows: int
    cols: int
    local_row: int
    local_col: int


@dataclass(kw_only=True, frozen=True)
class SourceParam:
    """One parameter in one rank's exported buffers."""

    name: str
    """Megatron's name with the layer's and the expert's global number."""
    shape: tuple[int, ...]
    buffer: int
    """Index into `SourceRank.buffers`."""
    offset_bytes: int


@dataclass(kw_only=True, frozen=True)
class SourceBuffer:
    """One exported block of memory; how to open it is the transport's business."""

    handle: str
    num_bytes: int


@dataclass(kw_only=True, frozen=True)
class SourceRank:
    """What one trainer rank exports. JSON-serialisable through `to_json`."""

    rank: int
    tp_rank: int
    tp_size: int
    etp_rank: int = 0
    """Its place among the ranks that share its experts."""
    etp_size: int = 1
    host: str
    """Address under which other hosts reach its host; equal for all ranks of a host, and for no others."""
    device: int
    """Number of its GPU on its host, see `mrl.reshard.transport.device_number`; -1 on CPU."""
    dtype: str
    """Torch's name: "float32", "bfloat16"."""
    buffers: tuple[SourceBuffer, ...]
    params: tuple[SourceParam, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SourceRank:
        buffers = tuple(SourceBuffer(**item) for item in data["buffers"])
        params = tuple(SourceParam(**{**item, "shape": tuple(item["shape"])}) for item in data["params"])
        return cls(**{**data, "buffers": buffers, "params": params})


def sources_to_json(sources: Sequence[SourceRank]) -> list[dict[str, Any]]:
    """Exports as JSON; ranks with equal parameter tables (data-parallel replicas) name the first one's place."""
    places: dict[tuple[SourceParam, ...], int] = {}
    data = []
    for place, source in enumerate(sources):
        first = places.setdefault(source.params, place)
        entry = replace(source, params=()).to_json()
        data.append(entry | {"params": first if first < place else [asdict(param) for param in source.params]})
    return data


def sources_from_json(data: Sequence[Mapping[str, Any]]) -> list[SourceRank]:
    """The inverse of `sources_to_json`; ranks with equal parameter tables share one."""
    sources: list[SourceRank] = []
    for entry in data:
        if isinstance(entry["params"], int):
            alone = SourceRank.from_json({**entry, "params": []})
            sources.append(replace(alone, params=sources[entry["params"]].params))
        else:
            sources.append(SourceRank.from_json(dict(entry)))
    return sources


@dataclass(kw_only=True, frozen=True)
class TargetParam:
    """One live parameter of an engine rank; contiguous, so its bytes run row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Torch's name, as in `SourceRank.dtype`."""
    element_size: int

    @property
    def rows(self) -> int:
        return as_matrix(self.shape)[0]

    @property
    def row_bytes(self) -> int:
        return as_matrix(self.shape)[1] * self.element_size

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


def targets_of(named_parameters: Iterable[tuple[str, Any]]) -> list[TargetParam]:
    """The manifest of a live module, from its `named_parameters()`; tensors are only looked at.

    Raises:
        ValueError: a parameter is not contiguous or has no dimension or more than three.
    """
    targets = []
    for name, param in named_parameters:
        shape = tuple(param.shape)
        if len(shape) not in (1, 2, 3):
            raise ValueError(f"parameter {name} has shape {shape}; only 1 to 3 dimensions can be resharded")
        if not param.is_contiguous():
            raise ValueError(f"parameter {name} of shape {shape} has strides {param.stride()}; it must be contiguous")
        dtype = str(param.dtype).removeprefix("torch.")
        targets.append(TargetParam(name=name, shape=shape, dtype=dtype, element_size=param.element_size()))
    return targets
