"""Initial weights from a Hugging Face folder or a checkpoint: every rank reads only its own pieces."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mrl.convert.sources import open_weights
from mrl.convert.weights import Weights, check_tensors, read_piece
from mrl.reshard.families import megatron_pieces, tensor_shapes
from mrl.reshard.families.decoder import LM_HEAD
from mrl.reshard.layout import Piece
from mrl.reshard.spec import ModelSpec

_SCORE = "score.weight"


@torch.no_grad()
def load_weights(
    path: str | Path,
    spec: ModelSpec,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    tp_rank: int,
    tp_size: int,
    etp_rank: int = 0,
    etp_size: int = 1,
    backbone_only: bool = False,
) -> None:
    """Fill parameters from a Hugging Face folder or a checkpoint of any layout; padded vocabulary rows become zero.

    Args:
        parameters: Megatron's names with global layer numbers.
        etp_rank, etp_size: the rank's place among those that share its experts.
        backbone_only: there need not be an lm_head.

    Raises:
        ValueError: no weights in the folder, a tensor missing or of another shape; the first one is named.
    """
    shapes = tensor_shapes(spec)
    if backbone_only:
        shapes.pop(LM_HEAD, None)
    place = {"tp_rank": tp_rank, "tp_size": tp_size, "etp_rank": etp_rank, "etp_size": etp_size}
    with open_weights(path, spec) as weights:
        check_tensors(weights, shapes)
        for name, parameter in parameters:
            _fill(parameter, megatron_pieces(spec, name, tuple(parameter.shape), **place), weights)


def read_score_weight(path: str | Path, spec: ModelSpec) -> Tensor:
    """The output layer of a sequence classifier with one label, [1, hidden].

    Raises:
        ValueError: the folder has none, or one of another shape.
    """
    with open_weights(path, spec) as weights:
        check_tensors(weights, {_SCORE: (1, spec.hidden_size)})
        return read_piece(weights, Piece(_SCORE, 0, 0, 1, spec.hidden_size, 0, 0))


def _fill(parameter: Tensor, pieces: list[Piece], weights: Weights) -> None:
    matrix = parameter.detach().view(parameter.shape[0], -1)
    if sum(piece.rows * piece.cols for piece in pieces) < matrix.numel():
        matrix.zero_()
    for piece in pieces:
        rows = slice(piece.local_row, piece.local_row + piece.rows)
        matrix[rows, piece.local_col : piece.local_col + piece.cols].copy_(read_piece(weights, piece))
