"""Two sets of weights compared tensor by tensor, a block of rows at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mrl.convert.dist_checkpoint import DistCheckpoint
from mrl.convert.dtypes import name_of
from mrl.convert.errors import ConvertError
from mrl.convert.locate import RoleFolder, find_role, is_hugging_face
from mrl.convert.megatron_weights import MegatronWeights, optimizer_prefixes
from mrl.convert.progress import Track
from mrl.convert.safetensors_files import SafetensorsFolder
from mrl.convert.streaming import read_ahead
from mrl.convert.weights import TensorInfo, Weights, read_rows, row_blocks
from mrl.reshard.families.decoder import LM_HEAD
from mrl.reshard.spec import load_spec

_NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = defaultdict(lambda: torch.float64, dict.fromkeys(_NARROW, torch.float32))
"""In which type values of another are compared."""


@dataclass(kw_only=True, frozen=True)
class TensorDiff:
    """One tensor in both; None where a side lacks it."""

    name: str
    left: TensorInfo | None
    right: TensorInfo | None
    max_abs: float = float("nan")
    """Largest difference of two elements; NaN if an element is, or the shapes differ."""
    relative: float = float("nan")
    """`max_abs` over the largest element of the right side."""
    is_bitwise_equal: bool = False

    def is_equal(self, atol: float | None) -> bool:
        """Bitwise and in type, or within `atol` in value if that is given."""
        return self.is_bitwise_equal or (atol is not None and self.max_abs <= atol)


def diff_weights(
    left: Path, right: Path, *, role: str | None, hf: Path | None, optimizer: bool, track: Track
) -> list[TensorDiff]:
    """Every tensor of two Hugging Face folders or checkpoints, in any mix.

    Args:
        role: which one of whole checkpoints; by default the actor.
        hf: folder with config.json for checkpoints that have none.
        optimizer: compare the optimizer's state instead of the weights; both are checkpoints.

    Raises:
        ValueError: a path that is neither, or a file that cannot be read.
    """
    with ExitStack() as stack:
        pairs: list[tuple[str, Weights, Weights]]
        if optimizer:
            pairs = _optimizer_states(stack, left, right, role, hf)
        else:
            pairs = [("", _open(stack, left, role, hf), _open(stack, right, role, hf))]
        num_bytes = sum(info.num_bytes for _, weights, _ in pairs for info in weights.tensors.values())
        with track("comparing", num_bytes) as advance:
            results = []
            for kind, one, other in pairs:
                for name in dict.fromkeys([*one.tensors, *other.tensors]):
                    results.append(_compare(kind, name, one, other))
                    advance(one.tensors[name].num_bytes if name in one.tensors else 0)
        return results


def render_diff(results: Sequence[TensorDiff], *, atol: float | None, only_different: bool, console: Console) -> None:
    """Print a table of the tensors and a line that counts them."""
    different = [result for result in results if not result.is_equal(atol)]
    table = Table()
    for column in ("tensor", "shape", "dtype", "max abs diff", "relative", "equal"):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold", no_wrap=True)
    for result in different if only_different else results:
        table.add_row(result.name, *_cells(result), "bitwise" if result.is_bitwise_equal else _verdict(result, atol))
    if table.rows:
        console.print(table)
    same = len(results) - len(different)
    console.print(f"{same} of {len(results)} tensors are equal, {len(different)} differ", highlight=False)


def _cells(result: TensorDiff) -> tuple[str, str, str, str]:
    left, right = result.left, result.right
    if left is None or right is None:
        present = left or right
        assert present is not None
        return str(list(present.shape)), name_of(present.dtype), "-", "-"
    shapes = [str(list(info.shape)) for info in (left, right)]
    dtypes = [name_of(info.dtype) for info in (left, right)]
    numbers = ("-", "-") if shapes[0] != shapes[1] else (f"{result.max_abs:.3e}", f"{result.relative:.3e}")
    return (" / ".join(dict.fromkeys(shapes)), " / ".join(dict.fromkeys(dtypes)), *numbers)


def _verdict(result: TensorDiff, atol: float | None) -> str:
    if result.left is None or result.right is None:
        return "only in " + ("A" if result.right is None else "B")
    return "within atol" if result.is_equal(atol) else "no"


def _open(stack: ExitStack, path: Path, role: str | None, hf: Path | None) -> Weights:
    path = path.expanduser()
    if is_hugging_face(path):
        weights = stack.enter_context(SafetensorsFolder(path))
        if (path / "config.json").is_file() and _is_tied(path):
            # Some writers store the tied head a second time; nothing reads it.
            weights.tensors.pop(LM_HEAD, None)
        return weights
    source = find_role(path, role=role)
    return stack.enter_context(MegatronWeights(source.dist, source.spec(hf)))


def _is_tied(path: Path) -> bool:
    try:
        return load_spec(path).tie_word_embeddings
    except ValueError:
        # Of a model that this package cannot convert, the tensors can still be compared.
        return False


def _optimizer_states(
    stack: ExitStack, left: Path, right: Path, role: str | None, hf: Path | None
) -> list[tuple[str, Weights, Weights]]:
    sides = [_checkpoint(path, role) for path in (left, right)]
    prefixes = []
    for side in sides:
        with DistCheckpoint(side.dist) as checkpoint:
            prefixes.append(optimizer_prefixes(checkpoint))
    if not all(prefixes) or prefixes[0] != prefixes[1]:
        names = [", ".join(found) or "none" for found in prefixes]
        raise ConvertError(
            f"the optimizer states of {left} ({names[0]}) and {right} ({names[1]}) cannot be compared; give two "
            "checkpoints of runs with the same megatron.use_distributed_optimizer"
        )
    pairs: list[tuple[str, Weights, Weights]] = []
    for prefix in prefixes[0]:
        one, other = (stack.enter_context(MegatronWeights(side.dist, side.spec(hf), prefix=prefix)) for side in sides)
        pairs.append((prefix.split(".")[-2] + " ", one, other))
    return pairs


def _checkpoint(path: Path, role: str | None) -> RoleFolder:
    if is_hugging_face(path):
        raise ConvertError(f"{path} is a Hugging Face folder, which has no optimizer state; drop --optimizer")
    return find_role(path, role=role)


def _compare(kind: str, name: str, left: Weights, right: Weights) -> TensorDiff:
    one, other = left.tensors.get(name), right.tensors.get(name)
    if one is None or other is None or one.shape != other.shape:
        return TensorDiff(name=kind + name, left=one, right=other)
    max_abs = largest = 0.0
    is_equal = one.dtype == other.dtype
    for block, reference in read_ahead(_block_pairs(left, right, name)):
        if block.dtype != reference.dtype or not torch.equal(block.view(torch.uint8), reference.view(torch.uint8)):
            is_equal = False
            max_abs = _largest(max_abs, block.to(_WIDE[block.dtype]) - reference.to(_WIDE[reference.dtype]))
        largest = _largest(largest, reference)
    relative = 0.0 if max_abs == 0 else max_abs / largest if largest else float("inf")
    return TensorDiff(
        name=kind + name, left=one, right=other, max_abs=max_abs, relative=relative, is_bitwise_equal=is_equal
    )


def _largest(so_far: float, block: Tensor) -> float:
    """The largest magnitude so far and in the block; NaN if there was one."""
    if not block.numel():
        return so_far
    here = float(block.to(_WIDE[block.dtype]).abs_().max())
    return here if here != here or here > so_far else so_far


def _block_pairs(left: Weights, right: Weights, name: str) -> Iterator[tuple[int, Callable[[], tuple[Tensor, Tensor]]]]:
    infos = left.tensors[name], right.tensors[name]
    itemsize = sum(info.dtype.itemsize for info in infos)
    for rows in row_blocks(infos[0]):
        yield len(rows) * infos[0].cols * itemsize, partial(_read_pair, left, right, name, rows)


def _read_pair(left: Weights, right: Weights, name: str, rows: range) -> tuple[Tensor, Tensor]:
    return read_rows(left, name, rows), read_rows(right, name, rows)
