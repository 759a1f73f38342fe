"""What layout tables are made of: a rank's cut of an axis, boxes of checkpoint tensors, rules for parameters.

Every local parameter is described as boxes of canonical Hugging Face tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mrl.reshard.layout import Piece, as_matrix


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's place on the tensor-parallel axis of one side."""

    side: str
    rank: int
    size: int
    ep_size: int = 1
    """Of SGLang: into how many groups of consecutive ranks the axis is divided to share out the experts."""
    etp_rank: int = 0
    """Of Megatron: the rank's place among those that share each of its experts, an axis of its own."""
    etp_size: int = 1

    def share(self, total: int, what: str) -> int:
        """`total` divided over the axis; ValueError if it does not divide."""
        if total % self.size:
            raise ValueError(f"{what} = {total} is not divisible by the {self.side} tensor parallel size {self.size}")
        return total // self.size

    def of_expert(self) -> Cut:
        """Megatron's cut of an expert."""
        return Cut(f"{self.side} expert", self.etp_rank, self.etp_size)

    def experts(self, num_experts: int) -> tuple[range, Cut]:
        """SGLang's experts of the rank, and its cut of each of them; ValueError if the sizes do not divide."""
        if num_experts % self.ep_size or self.size % self.ep_size:
            raise ValueError(
                f"{self.side} expert parallel size {self.ep_size} does not divide num_experts = {num_experts} or the "
                f"tensor parallel size {self.size}"
            )
        within, local = self.size // self.ep_size, num_experts // self.ep_size
        first = self.rank // within * local
        return range(first, first + local), Cut(self.side, self.rank % within, within)


@dataclass(frozen=True, slots=True)
class LocalParam:
    """What a rank holds under one parameter name: its shape and the boxes that fill it."""

    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a Hugging Face tensor."""

    tensor: str
    row: int
    rows: int


Rule = Callable[[Cut, str], LocalParam]
"""(cut, Hugging Face prefix of the layer) -> local parameter."""


@dataclass(kw_only=True, frozen=True)
class Part:
    """A part of every layer; all names lack the layer's prefix."""

    tensors: Mapping[str, tuple[int, ...]]
    """Names and shapes in the checkpoint."""
    megatron: Mapping[str, Rule]
    """By parameter of a TransformerLayer, in the local and the transformer-engine spec."""
    sglang: Mapping[str, Rule]
    """By parameter of SGLang's layer."""


def stack(segments: Iterable[Segment], cols: int, start: int = 0, stop: int | None = None) -> list[Piece]:
    """Pieces of the rows [start, stop) of the segments laid end to end, at local row 0."""
    pieces, at = [], 0
    for segment in segments:
        low = max(at, start)
        high = at + segment.rows if stop is None else min(at + segment.rows, stop)
        if low < high:
            pieces.append(Piece(segment.tensor, segment.row + low - at, 0, high - low, cols, low - start, 0))
        at += segment.rows
    return pieces


def replicated(tensor: str, *shape: int) -> Rule:
    """Every rank holds the whole tensor."""
    rows, cols = as_matrix(shape)
    return lambda cut, prefix: LocalParam(shape, stack([Segment(prefix + tensor, 0, rows)], cols))


def column_share(tensor: str, rows: int, cols: int, what: str) -> Rule:
    """Each rank holds an equal share of the columns; `what` names them in errors."""

    def rule(cut: Cut, prefix: str) -> LocalParam:
        share = cut.share(cols, what)
        return LocalParam((rows, share), [Piece(prefix + tensor, 0, share * cut.rank, rows, share, 0, 0)])

    return rule


def stacked_row_shares(tensors: Iterable[str], rows: int, cols: int, what: str) -> Rule:
    """Each rank holds its equal share of the rows of the first tensor, then of the second, and so on."""
    tensors = tuple(tensors)

    def rule(cut: Cut, prefix: str) -> LocalParam:
        share = cut.share(rows, what)
        segments = [Segment(prefix + tensor, share * cut.rank, share) for tensor in tensors]
        return LocalParam((len(tensors) * share, cols), stack(segments, cols))

    return rule
