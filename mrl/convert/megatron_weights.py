"""The weights in a torch_dist checkpoint under their Hugging Face names."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mrl.convert.dist_checkpoint import DistCheckpoint
from mrl.convert.errors import DamageError
from mrl.convert.names import OPTIMIZER_PREFIX, VALUE_HEAD, Parameter, Place, stored_parameters
from mrl.convert.weights import TensorInfo, assemble
from mrl.reshard.families import megatron_pieces, tensor_shapes
from mrl.reshard.families.decoder import LM_HEAD
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec


class MegatronWeights:
    """See `Weights`. A critic's are those of its backbone and `value_head.*`; padded vocabulary rows are left out.

    Args:
        prefix: of the keys that are read, such as `optimizer.state.exp_avg.` for a moment in place of the weights.

    Raises:
        ConvertError: the folder is no checkpoint. DamageError: it holds other tensors than the model has.
    """

    def __init__(self, folder: Path, spec: ModelSpec, *, prefix: str = "") -> None:
        self.path = folder
        self._prefix = prefix
        self.checkpoint = DistCheckpoint(folder)
        self.is_critic = "output_layer.bias" in self.checkpoint.tensors
        self._places: dict[str, Place] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        shapes = tensor_shapes(spec)
        if self.is_critic:
            shapes.pop(LM_HEAD, None)
        dtypes: dict[str, torch.dtype] = {}
        for full_key, stored in self.checkpoint.tensors.items():
            key = full_key.removeprefix(prefix)
            if key.startswith(OPTIMIZER_PREFIX) or not full_key.startswith(prefix):
                continue
            for parameter in stored_parameters(key, stored.info.shape):
                for piece in self._pieces_of(parameter, spec):
                    self._pieces.setdefault(piece.tensor, []).append(_inverse(piece, parameter.name))
                    dtypes[piece.tensor] = stored.info.dtype
                self._places[parameter.name] = parameter.place
        for name, shape in (shapes | self._value_head_shapes()).items():
            if name not in dtypes:
                raise DamageError(f"{folder}: tensor {prefix}{name} of the model is not in the checkpoint")
            self.tensors[name] = TensorInfo(shape, dtypes[name])
            self._check_cover(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.checkpoint.__exit__(kind, error, traceback)

    def read_into(self, target: Tensor, name: str, row: int, col: int) -> None:
        assemble(target, row, col, self._pieces[name], self._read_stored)

    def _read_stored(self, target: Tensor, parameter: str, row: int, col: int) -> None:
        place = self._places[parameter]
        self.checkpoint.read_into(target, self._prefix + place.key, place.lead, row, col)

    def _pieces_of(self, parameter: Parameter, spec: ModelSpec) -> list[Piece]:
        if self.is_critic and parameter.name in VALUE_HEAD:
            info = TensorInfo(parameter.shape, torch.float32)
            return [Piece(VALUE_HEAD[parameter.name], 0, 0, info.rows, info.cols, 0, 0)]
        if spec.tie_word_embeddings and parameter.name == "output_layer.weight":
            return []
        try:
            return megatron_pieces(spec, parameter.name, parameter.shape, tp_rank=0, tp_size=1)
        except ValueError as error:
            raise DamageError(f"{self.path}: {error}") from error

    def _value_head_shapes(self) -> dict[str, tuple[int, ...]]:
        stored = self.checkpoint.tensors
        return {name: stored[key].info.shape for key, name in VALUE_HEAD.items()} if self.is_critic else {}

    def _check_cover(self, name: str) -> None:
        covered = sum(piece.rows * piece.cols for piece in self._pieces[name])
        if covered != self.tensors[name].numel:
            raise DamageError(
                f"{self.path}: the checkpoint holds {covered} elements of tensor {self._prefix}{name}, the model has "
                f"{self.tensors[name].numel}"
            )


def _inverse(piece: Piece, parameter: str) -> Piece:
    """The same box seen from the Hugging Face tensor."""
    return Piece(parameter, piece.local_row, piece.local_col, piece.rows, piece.cols, piece.row, piece.col)


def optimizer_prefixes(checkpoint: DistCheckpoint) -> list[str]:
    """The prefixes of what the optimizer keeps for every parameter: its moments, a copy in float32."""
    keys = (key.removeprefix(OPTIMIZER_PREFIX) for key in checkpoint.tensors if key.startswith(OPTIMIZER_PREFIX))
    return sorted({f"{OPTIMIZER_PREFIX}{key.partition('.')[0]}." for key in keys})
