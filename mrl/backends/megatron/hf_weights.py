"""Initial weights from a Hugging Face folder: every rank reads only its own pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mrl.reshard.families import megatron_pieces, tensor_shapes
from mrl.reshard.families.decoder import LM_HEAD
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HuggingFaceFolder:
    """The safetensors files of one model folder, opened lazily; a context manager."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of = self._read_index()

    def __enter__(self) -> HuggingFaceFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError naming the first tensor that is missing or has another shape."""
        for name, expected in shapes.items():
            shape = tuple(self._slice(name).get_shape())
            if shape != expected:
                raise ValueError(
                    f"{self._path}: tensor {name} has shape {list(shape)}, but config.json gives {list(expected)}"
                )

    def read(self, piece: Piece) -> Tensor:
        """The piece's box, [rows, cols] (cols = 1 for a vector), in the checkpoint's dtype."""
        tensor = self._slice(piece.tensor)
        rows = slice(piece.row, piece.row + piece.rows)
        if len(tensor.get_shape()) == 1:
            return tensor[rows].unsqueeze(1)
        return tensor[rows, piece.col : piece.col + piece.cols]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self._path}: tensor {name} is missing from the checkpoint")
        return self._handle(self._file_of[name]).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                opened = safe_open(self._path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self._path / file} cannot be read as safetensors: {error}") from error
            self._handles[file] = self._open_files.enter_context(opened)
        return self._handles[file]

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self._path / _INDEX).is_file():
            return dict(json.loads((self._path / _INDEX).read_text())["weight_map"])
        if not (self._path / _SINGLE).is_file():
            raise ValueError(f"{self._path} holds no weights: neither {_SINGLE} nor {_INDEX} exists")
        return {name: _SINGLE for name in self._handle(_SINGLE).keys()}  # noqa: SIM118


@torch.no_grad()
def load_hf_weights(
    path: str | Path,
    spec: ModelSpec,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    tp_rank: int,
    tp_size: int,
    backbone_only: bool = False,
) -> None:
    """Fill parameters from a Hugging Face folder; padded vocabulary rows become zero.

    Args:
        parameters: Megatron's names with global layer numbers.
        backbone_only: the folder need not have an lm_head.

    Raises:
        ValueError: no weights in the folder, a tensor missing or of another shape; the first one is named.
    """
    shapes = tensor_shapes(spec)
    if backbone_only:
        shapes.pop(LM_HEAD, None)
    with HuggingFaceFolder(path) as folder:
        folder.check(shapes)
        for name, parameter in parameters:
            pieces = megatron_pieces(spec, name, tuple(parameter.shape), tp_rank=tp_rank, tp_size=tp_size)
            _fill(parameter, pieces, folder)


def _fill(parameter: Tensor, pieces: list[Piece], folder: HuggingFaceFolder) -> None:
    matrix = parameter.detach().view(parameter.shape[0], -1)
    if sum(piece.rows * piece.cols for piece in pieces) < matrix.numel():
        matrix.zero_()
    for piece in pieces:
        rows = slice(piece.local_row, piece.local_row + piece.rows)
        matrix[rows, piece.local_col : piece.local_col + piece.cols].copy_(folder.read(piece))
