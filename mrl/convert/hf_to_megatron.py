"""A Hugging Face folder as a torch_dist checkpoint from which a run, in any layout, can take its initial weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mrl.convert.cuts import Box, boxes_of_ranks, stage_of, whole_pieces
from mrl.convert.dist_writer import NewObject, NewShard, shards_of, write_dist_checkpoint
from mrl.convert.dtypes import name_of, one_dtype
from mrl.convert.locate import ENGINE_STATE, MODEL
from mrl.convert.names import model_parameters, pickled_objects
from mrl.convert.output import output_folder
from mrl.convert.progress import Track
from mrl.convert.safetensors_files import SafetensorsFolder
from mrl.convert.weights import Weights, assemble, check_tensors
from mrl.parallel.auto_layout import check_layout
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.hf_export import copy_model_files
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec, load_spec
from mrl.trainer.manifest import Manifest, describe_role, list_files, record_files, write_manifest
from mrl.trainer.resume import HUGGING_FACE


def convert_to_megatron(
    hf: Path, out: Path, layout: ParallelLayout, *, dtype: torch.dtype | None, overwrite: bool, track: Track
) -> None:
    """Write the checkpoint of the folder `hf`.

    Args:
        layout: whose ranks' shards the files hold: a rank of that layout reads its own bytes only; every other layout
            loads it, too.
        dtype: of the checkpoint; None keeps the folder's.

    Raises:
        ValueError: a model, tensor, layout or output that cannot be; says which.
        OSError: something could not be written.
    """
    spec = load_spec(hf)
    check_layout(layout, spec)
    shapes = tensor_shapes(spec)
    with SafetensorsFolder(hf) as weights:
        check_tensors(weights, shapes)
        stored = one_dtype(weights, shapes)
        target = dtype or stored
        num_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * target.itemsize
        with output_folder(out, num_bytes=num_bytes, overwrite=overwrite) as folder:
            ranks = _shards_of_ranks(spec, layout, weights, target)
            (folder / ENGINE_STATE).mkdir()
            with track(f"writing {out}", num_bytes) as advance:
                records = write_dist_checkpoint(folder / ENGINE_STATE, ranks, advance)
            (folder / HUGGING_FACE).mkdir()
            copy_model_files(hf, hf, folder / HUGGING_FACE, dtype=name_of(target))
            files = {f"{ENGINE_STATE}/{name}": record for name, record in records.items()}
            files |= record_files(folder, [name for name in list_files(folder) if name not in files])
            record = describe_role(spec, layout, dtype=name_of(target), distributed_optimizer=False, is_critic=False)
            write_manifest(folder, Manifest(step=0, weight_version=0, roles={MODEL: record}, files=files))


def _shards_of_ranks(
    spec: ModelSpec, layout: ParallelLayout, weights: Weights, dtype: torch.dtype
) -> list[list[NewShard | NewObject]]:
    """What each rank of one replica writes, its file's contents in order."""
    parameters = model_parameters(spec)
    ranks: list[list[NewShard | NewObject]] = [[] for _ in range(layout.tp * layout.pp)]
    ranks[0] += [NewObject(key=key, data=data) for key, data in pickled_objects(parameters)]
    for parameter in parameters:
        pieces = whole_pieces(spec, parameter)
        first = stage_of(spec, pieces, layout) * layout.tp
        for tp_rank, boxes in enumerate(boxes_of_ranks(spec, parameter, layout.tp)):
            ranks[first + tp_rank] += shards_of(parameter, boxes, dtype, partial(_read, weights, pieces, dtype))
    return ranks


def _read(weights: Weights, pieces: list[Piece], dtype: torch.dtype, box: Box) -> Tensor:
    stored = torch.empty(box.rows, box.cols, dtype=weights.tensors[pieces[0].tensor].dtype)
    assemble(stored, box.row, box.col, pieces, weights.read_into)
    return stored.to(dtype)
