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
from mrl.parallel.agreement import broadcast_result
from mrl.reshard.families import megatron_pieces, tensor_shapes
from mrl.reshard.hf_export import ExportFile, plan_files, stage_of_unit, unit_of, write_index
from mrl.reshard.layout import Piece

if TYPE_CHECKING:
    from mrl.backends.megatron.engine import EngineParts

_MAX_FILE_BYTES = 2**30
"""What a writer holds in host memory at a time, unless one layer or the vocabulary is larger."""


class StagedExport:
    """One rank's files of an export; see `mrl.interfaces.CheckpointWrite`."""

    def __init__(self, folder: Path, files: list[ExportFile]) -> None:
        self._folder = folder
        self._files = files
        self._waiting: list[tuple[Path, dict[str, Tensor]]] = []
        self._written: list[Path] = []
        self._failure: Exception | None = None

    def add(self, name: str, tensors: dict[str, Tensor], *, in_background: bool) -> None:
        """Take one file's tensors and write them now or in `write`; an error is kept for the latter."""
        if self._failure is not None:
            return
        self._waiting.append((self._folder / name, tensors))
        if in_background:
            return
        try:
            self._write_waiting()
        except (OSError, SafetensorError) as error:
            self._failure = error

    def write(self) -> list[Path]:
        """Write what waits; returns this rank's files. In any thread, no collective.

        Raises:
            CheckpointError: the system refused, now or while the export was gathered.
        """
        try:
            if self._failure is not None:
                raise self._failure
            self._write_waiting()
        except (OSError, SafetensorError) as error:
            raise _failed(self._folder, error) from error
        return self._written

    def finish(self) -> None:
        """Write the index of all ranks' files. Called by all ranks, when `write` is done on all of them.

        Raises:
            CheckpointError: the system refused; on all ranks.
        """
        broadcast_result(self._write_index)

    def _write_waiting(self) -> None:
        while self._waiting:
            path, tensors = self._waiting.pop(0)
            save_file(tensors, path, metadata={"format": "pt"})
            self._written.append(path)

    def _write_index(self) -> None:
        try:
            write_index(self._folder, self._files)
        except OSError as error:
            raise _failed(self._folder, error) from error


def _failed(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot write the model {folder}: rank {dist.get_rank()}: {error}")


@torch.no_grad()
def stage_hf_weights(
    parts: EngineParts, folder: Path, *, in_background: bool, max_file_bytes: int = _MAX_FILE_BYTES
) -> StagedExport:
    """The role's weights as safetensors files of `folder`, which exists.

    Padded vocabulary rows are left out; a tied head is stored once, as the embedding. Called by all ranks, inside the
    role's state.

    Args:
        in_background: gather everything now, for `write` to write it; otherwise a file is written before the next one
            is gathered, so that a writer holds no more than `max_file_bytes`.
    """
    parameters = dict(item for chunk in parts.chunks for item in chunk.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    files = plan_files(parts.spec, parts.layout, bytes_per_element=dtype.itemsize, max_file_bytes=max_file_bytes)
    groups, staged = parts.groups, StagedExport(folder, files)
    for file in files:
        if (file.pp_rank, file.dp_rank) != (groups.pp.rank(), groups.dp.rank()):
            continue
        tensors = _gather(parts, parameters, file, dtype)
        if groups.tp.rank() == 0:
            staged.add(file.name, tensors, in_background=in_background)
    return staged


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
