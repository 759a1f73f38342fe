"""A role's live parameters as a Hugging Face model, gathered and written a few layers at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mrl.interfaces import CheckpointError
from mrl.parallel.agreement import gather_results
from mrl.reshard.families import megatron_pieces, tensor_shapes
from mrl.reshard.hf_export import ExportFile, plan_files, stage_of_unit, unit_of, write_index
from mrl.reshard.layout import Piece

if TYPE_CHECKING:
    from mrl.backends.megatron.engine import EngineParts

_MAX_FILE_BYTES = 2**30
"""What a writer holds in host memory at a time, unless one layer or the vocabulary is larger."""


@torch.no_grad()
def export_hf_weights(parts: EngineParts, folder: Path, *, max_file_bytes: int = _MAX_FILE_BYTES) -> None:
    """Write the safetensors files and their index to `folder`, which exists.

    Padded vocabulary rows are left out; a tied head is stored once, as the embedding. Called by all ranks, inside the
    role's state.

    Raises:
        CheckpointError: a file could not be written; on all ranks.
    """
    parameters = dict(item for chunk in parts.chunks for item in chunk.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    files = plan_files(parts.spec, parts.layout, bytes_per_element=dtype.itemsize, max_file_bytes=max_file_bytes)
    gather_results(lambda: _write_share(parts, parameters, files, folder, dtype))


def _write_share(
    parts: EngineParts,
    parameters: dict[str, torch.nn.Parameter],
    files: list[ExportFile],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    groups = parts.groups
    writes = groups.tp.rank() == 0
    failure: Exception | None = None
    place = groups.pp.rank(), groups.dp.rank()
    for file in files:
        if (file.pp_rank, file.dp_rank) != place:
            continue
        tensors = _gather(parts, parameters, file, dtype)
        if not writes or failure is not None:
            continue
        try:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            # The other ranks of tp_group still wait for this one to take part in the rest.
            failure = error
    if dist.get_rank() == 0 and failure is None:
        try:
            write_index(folder, files)
        except OSError as error:
            failure = error
    if failure is not None:
        raise CheckpointError(f"cannot write the model {folder}: {failure}") from failure


def _gather(
    parts: EngineParts, parameters: dict[str, torch.nn.Parameter], file: ExportFile, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The file's tensors on the CPU of tp rank 0; empty on the others. Called by all of tp_group."""
    spec, tp_group = parts.spec, parts.groups.tp
    collects, tp_size = tp_group.rank() == 0, tp_group.size()
    shapes = tensor_shapes(spec)
    tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in file.tensors} if collects else {}
    missing = {name: tensor.numel() for name, tensor in tensors.items()}
    for name, parameter in parameters.items():
        pieces = [
            megatron_pieces(spec, name, tuple(parameter.shape), tp_rank=rank, tp_size=tp_size)
            for rank in range(tp_size)
        ]
        unit = unit_of(pieces[0][0].tensor, spec)
        if unit not in file.units or stage_of_unit(unit, spec, parts.layout) != parts.groups.pp.rank():
            continue
        shards = [torch.empty_like(parameter) for _ in range(tp_size)] if collects else None
        dist.gather(parameter.detach(), shards, group=tp_group, group_dst=0)
        # A parameter that every rank has whole, such as a norm, is taken once.
        for rank, shard in enumerate(shards or []):
            if rank == 0 or pieces[rank] != pieces[0]:
                _place(tensors, missing, shard, pieces[rank])
    absent = [name for name, count in missing.items() if count]
    assert not absent, f"parameters do not fill the tensors {absent[:3]}"
    return tensors


def _place(tensors: dict[str, Tensor], missing: dict[str, int], shard: Tensor, pieces: list[Piece]) -> None:
    local = shard.view(shard.shape[0], -1)
    for piece in pieces:
        box = local[piece.local_row : piece.local_row + piece.rows, piece.local_col : piece.local_col + piece.cols]
        target = tensors[piece.tensor]
        matrix = target.view(target.shape[0], -1)
        matrix[piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols].copy_(box)
        missing[piece.tensor] -= piece.rows * piece.cols
