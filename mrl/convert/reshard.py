"""A checkpoint rewritten for another layout, everything in it included: one file per rank, cut as its ranks read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mrl.convert.cuts import Box, boxes_of_ranks, stage_of, whole_pieces
from mrl.convert.dist_checkpoint import DistCheckpoint
from mrl.convert.dist_writer import NewObject, NewShard, shards_of, write_dist_checkpoint
from mrl.convert.errors import ConvertError
from mrl.convert.locate import ENGINE_STATE, MODEL
from mrl.convert.megatron_weights import optimizer_prefixes
from mrl.convert.names import VALUE_HEAD, Parameter, stored_parameters
from mrl.convert.output import output_folder
from mrl.convert.progress import Track
from mrl.convert.verify import verify_checksums
from mrl.parallel.auto_layout import check_layout
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import VOCABULARY_PARAMS
from mrl.reshard.spec import ModelSpec
from mrl.trainer.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    list_files,
    read_manifest,
    record_files,
    write_manifest,
)

Ranks = list[list[NewShard | NewObject]]


def reshard_checkpoint(checkpoint: Path, out: Path, layout: ParallelLayout, *, overwrite: bool, track: Track) -> None:
    """Write a checkpoint of the same contents whose files are cut for `layout`; its checksums are verified first.

    Padded vocabulary rows are dropped; loading adds those that a layout needs.

    Raises:
        ValueError: a checkpoint, layout or output that cannot be. CheckpointError: a file of it is damaged.
        OSError: something could not be written.
    """
    checkpoint = checkpoint.expanduser().absolute()
    if not (checkpoint / MANIFEST).is_file():
        raise ConvertError(
            f"{checkpoint} has no {MANIFEST}; give a whole checkpoint, such as RUN/checkpoints/global_step_5"
        )
    manifest = read_manifest(checkpoint)
    homes = {role: checkpoint if role == MODEL else checkpoint / role for role in manifest.roles}
    homes = {role: home for role, home in homes.items() if (home / ENGINE_STATE).is_dir()}
    for role in homes:
        check_layout(layout, ModelSpec.from_json(manifest.roles[role].spec))
    verify_checksums(checkpoint, manifest, track)
    with output_folder(out, num_bytes=_size(manifest), overwrite=overwrite) as folder:
        files: dict[str, FileRecord] = {}
        for role, home in homes.items():
            target = folder / home.relative_to(checkpoint) / ENGINE_STATE
            target.mkdir(parents=True)
            records = _reshard_role(manifest, role, home, target, layout, track)
            files |= {str((target / name).relative_to(folder)): record for name, record in records.items()}
        _copy_others(checkpoint, folder)
        files |= record_files(folder, [name for name in list_files(folder) if name not in files])
        roles = {role: replace(manifest.roles[role], layout=asdict(layout)) for role in homes}
        write_manifest(folder, replace(manifest, roles=roles, files=files))


def _reshard_role(
    manifest: Manifest, role: str, home: Path, target: Path, layout: ParallelLayout, track: Track
) -> dict[str, FileRecord]:
    spec = ModelSpec.from_json(manifest.roles[role].spec)
    with DistCheckpoint(home / ENGINE_STATE) as source:
        ranks = _cut(source, spec, layout)
        num_bytes = sum(item.num_bytes for items in ranks for item in items)
        with track(f"writing the {role}", num_bytes) as advance:
            return write_dist_checkpoint(target, ranks, advance)


def _cut(source: DistCheckpoint, spec: ModelSpec, layout: ParallelLayout) -> Ranks:
    """What each rank of one replica writes; objects are with the first."""
    ranks: Ranks = [[] for _ in range(layout.tp * layout.pp)]
    ranks[0] += [NewObject(key=key, data=source.read_object(key)) for key in source.objects]
    prefixes = optimizer_prefixes(source)
    is_critic = "output_layer.bias" in source.tensors
    for key, stored in source.tensors.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        for parameter in stored_parameters(key.removeprefix(prefix), stored.info.shape):
            parameter = _without_padding(parameter, spec, is_critic=is_critic)
            place, dtype = parameter.place, stored.info.dtype
            read = partial(_read, source, key, place.lead, dtype)
            for rank, boxes in _owners(parameter, spec, layout, is_critic=is_critic):
                ranks[rank] += shards_of(replace(parameter, place=replace(place, key=key)), boxes, dtype, read)
    return ranks


def _owners(
    parameter: Parameter, spec: ModelSpec, layout: ParallelLayout, *, is_critic: bool
) -> Iterator[tuple[int, list[Box]]]:
    """Rank and boxes of each rank that writes a part of the parameter."""
    shape = parameter.shape
    if is_critic and parameter.name in VALUE_HEAD:
        yield (layout.pp - 1) * layout.tp, [Box(0, 0, shape[0], shape[1] if len(shape) > 1 else 1)]
        return
    stage = stage_of(spec, whole_pieces(spec, parameter), layout)
    for tp_rank, boxes in enumerate(boxes_of_ranks(spec, parameter, layout.tp)):
        yield stage * layout.tp + tp_rank, boxes


def _without_padding(parameter: Parameter, spec: ModelSpec, *, is_critic: bool) -> Parameter:
    is_value_head = is_critic and parameter.name in VALUE_HEAD
    if parameter.name not in VOCABULARY_PARAMS or is_value_head:
        return parameter
    return replace(parameter, shape=(spec.vocab_size, *parameter.shape[1:]))


def _read(source: DistCheckpoint, key: str, lead: tuple[int, ...], dtype: torch.dtype, box: Box) -> Tensor:
    target = torch.empty(box.rows, box.cols, dtype=dtype)
    source.read_into(target, key, lead, box.row, box.col)
    return target


def _copy_others(checkpoint: Path, folder: Path) -> None:
    """Copy what is neither the manifest nor in a torch_dist folder."""
    for name in list_files(checkpoint):
        if ENGINE_STATE not in Path(name).parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name)


def _size(manifest: Manifest) -> int:
    return sum(record.num_bytes for record in manifest.files.values())
