"""A role's live parameters as a Hugging Face model, gathered and written a few layers at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mrl.backends.megatron.model import is_expert_parameter, shift_expert
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
    staged = StagedExport(folder, files)
    for file in files:
        gathering = _Gathering(parts, parameters, file, dtype)
        tensors = gathering.run()
        if gathering.writes:
            staged.add(file.name, tensors, in_background=in_background)
    return staged


class _Gathering:
    """One file's tensors on their way to the rank that writes it: tp rank 0 of the file's data-parallel rank.

    Tensors come from its tp_group, experts from its tp_ep_group, which may lie within the former or extend it.
    """

    def __init__(
        self, parts: EngineParts, parameters: Mapping[str, torch.nn.Parameter], file: ExportFile, dtype: torch.dtype
    ) -> None:
        groups, layout = parts.groups, parts.layout
        on_stage = groups.pp.rank() == file.pp_rank
        # Places on the stage: tensor-parallel ranks are consecutive, and so are those that have all experts.
        place = dist.get_rank() % (layout.world_size // layout.pp)
        writer = file.dp_rank * layout.cp * layout.tp
        self.writes = on_stage and place == writer
        self._in_tp_group = on_stage and place // layout.tp == writer // layout.tp
        with_experts = layout.ep * layout.etp
        self._in_tp_ep_group = on_stage and place // with_experts == writer // with_experts
        self._writer_of_experts = writer % with_experts
        self._parts = parts
        self._parameters = parameters
        self._file = file
        shapes = tensor_shapes(parts.spec)
        names = file.tensors if self.writes else ()
        self._tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
        self._missing = {name: tensor.numel() for name, tensor in self._tensors.items()}

    def run(self) -> dict[str, Tensor]:
        """The tensors, on the CPU of the rank that writes; empty on the others. Called by all ranks."""
        for name, parameter in self._parameters.items():
            is_expert = is_expert_parameter(name)
            if not (self._in_tp_ep_group if is_expert else self._in_tp_group):
                continue
            pieces = self._pieces(name, parameter, is_expert)
            unit = unit_of(pieces[0][0].tensor, self._parts.spec)
            if unit in self._file.units and stage_of_unit(unit, self._parts.spec, self._parts.layout) == (
                self._file.pp_rank
            ):
                self._take(parameter, pieces, is_expert)
        absent = [name for name, count in self._missing.items() if count]
        assert not absent, f"parameters do not fill the tensors {absent[:3]}"
        return self._tensors

    def _pieces(self, name: str, parameter: torch.nn.Parameter, is_expert: bool) -> list[list[Piece]]:
        """Of each rank that takes part; ranks of the tp_ep_group hold other experts, or parts, in one place."""
        parts, shape, tp, etp = self._parts, tuple(parameter.shape), self._parts.layout.tp, self._parts.layout.etp
        if not is_expert:
            return [megatron_pieces(parts.spec, name, shape, tp_rank=rank, tp_size=tp) for rank in range(tp)]
        share, mine = len(parts.chunks[0].experts), parts.groups.ep.rank()
        return [
            megatron_pieces(parts.spec, each, shape, tp_rank=0, tp_size=1, etp_rank=etp_rank, etp_size=etp)
            for each in (shift_expert(name, share * (rank - mine)) for rank in range(parts.layout.ep))
            for etp_rank in range(etp)
        ]

    def _take(self, parameter: torch.nn.Parameter, pieces: list[list[Piece]], is_expert: bool) -> None:
        groups = self._parts.groups
        group, writer = (groups.tp_ep, self._writer_of_experts) if is_expert else (groups.tp, 0)
        shards = [torch.empty_like(parameter) for _ in pieces] if self.writes else None
        dist.gather(parameter.detach(), shards, group=group, group_dst=writer)
        # A parameter that every rank has whole, such as a norm, is taken once.
        for rank, shard in enumerate(shards or []):
            if rank == 0 or pieces[rank] != pieces[0]:
                _place(self._tensors, self._missing, shard, pieces[rank])


def _place(tensors: dict[str, Tensor], missing: dict[str, int], shard: Tensor, pieces: list[Piece]) -> None:
    local = shard.view(shard.shape[0], -1)
    for piece in pieces:
        box = local[piece.local_row : piece.local_row + piece.rows, piece.local_col : piece.local_col + piece.cols]
        target = tensors[piece.tensor]
        matrix = target.view(target.shape[0], -1)
        matrix[piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols].copy_(box)
        missing[piece.tensor] -= piece.rows * piece.cols
