"""Which rank writes which tensors into which file of an exported Hugging Face model, and what goes beside them.

Tensors are handled in units: the embedding, each layer, and what follows the layers. A unit is gathered and written by
one tensor-parallel group, and the groups work side by side: each pipeline stage has its own units, and its
data-parallel replicas divide them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.families.decoder import EMBEDDING
from mrl.reshard.spec import ModelSpec

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""What a model folder has beside weights and config.json that its users need."""


@dataclass(kw_only=True, frozen=True)
class ExportFile:
    """One safetensors file and who writes it."""

    name: str
    pp_rank: int
    dp_rank: int
    units: tuple[int, ...]
    tensors: tuple[str, ...]
    num_bytes: int


def unit_of(tensor: str, spec: ModelSpec) -> int:
    """0 is the embedding, 1 to num_hidden_layers the layers, the number after that what follows them."""
    match = _LAYER.match(tensor)
    if match:
        return int(match[1]) + 1
    return 0 if tensor == EMBEDDING else spec.num_hidden_layers + 1


def stage_of_unit(unit: int, spec: ModelSpec, layout: ParallelLayout) -> int:
    """Pipeline stage that holds a unit; a tied embedding's copy on the last stage is not counted."""
    if unit == 0:
        return 0
    if unit > spec.num_hidden_layers:
        return layout.pp - 1
    per_chunk = spec.num_hidden_layers // (layout.pp * (layout.vpp or 1))
    return (unit - 1) // per_chunk % layout.pp


def plan_files(
    spec: ModelSpec, layout: ParallelLayout, *, bytes_per_element: int, max_file_bytes: int
) -> list[ExportFile]:
    """The files of an export, in the order of their names; the same on every rank.

    Args:
        max_file_bytes: a file grows up to this, or holds a single larger unit; a writer needs as much memory.
    """
    by_unit: dict[int, list[str]] = {}
    shapes = tensor_shapes(spec)
    for tensor in shapes:
        by_unit.setdefault(unit_of(tensor, spec), []).append(tensor)
    unnamed: list[ExportFile] = []
    for unit, owner in _owners(sorted(by_unit), spec, layout):
        tensors = tuple(by_unit[unit])
        size = bytes_per_element * sum(math.prod(shapes[tensor]) for tensor in tensors)
        last = unnamed[-1] if unnamed else None
        if last and (last.pp_rank, last.dp_rank) == owner and last.num_bytes + size <= max_file_bytes:
            unnamed[-1] = replace(
                last,
                units=(*last.units, unit),
                tensors=last.tensors + tensors,
                num_bytes=last.num_bytes + size,
            )
        else:
            unnamed.append(_file(owner, unit, tensors, size))
    count = len(unnamed)
    names = [_SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [replace(file, name=name) for file, name in zip(unnamed, names, strict=True)]


def write_index(folder: Path, files: Sequence[ExportFile]) -> None:
    """Write the index that names each tensor's file; a single file needs none."""
    if len(files) == 1:
        return
    weight_map = {tensor: file.name for file in files for tensor in file.tensors}
    index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_model_files(model: Path, tokenizer: Path, folder: Path, *, dtype: str) -> None:
    """Write config.json with `dtype`, and copy tokenizer and generation settings."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    # Transformers 5 writes `dtype` and reads both; earlier versions know `torch_dtype` only.
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, path in list_model_files(model, tokenizer).items():
        shutil.copyfile(path, folder / name)


def list_model_files(model: Path, tokenizer: Path) -> dict[str, Path]:
    """Tokenizer and generation settings, by name; where both folders have a file, the tokenizer's."""
    paths = (path for source in (model, tokenizer) for pattern in _CARRIED for path in source.glob(pattern))
    return {path.name: path for path in paths if path.is_file()}


def _owners(units: Sequence[int], spec: ModelSpec, layout: ParallelLayout) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each unit with the (pp_rank, dp_rank) that writes it: replicas take consecutive runs of a stage's units."""
    for pp_rank in range(layout.pp):
        mine = [unit for unit in units if stage_of_unit(unit, spec, layout) == pp_rank]
        for number, unit in enumerate(mine):
            yield unit, (pp_rank, number * layout.dp // len(mine))


def _file(owner: tuple[int, int], unit: int, tensors: tuple[str, ...], num_bytes: int) -> ExportFile:
    pp_rank, dp_rank = owner
    return ExportFile(name="", pp_rank=pp_rank, dp_rank=dp_rank, units=(unit,), tensors=tensors, num_bytes=num_bytes)
