"""What a file that `torch.save` wrote of one tensor holds, without reading the tensor.

`torch.load` can tell as much in a fake mode, but that crashes outside the main thread.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import torch


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Shape and type of a tensor, and where its first element lies in the file, in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool
    offset: int


@dataclass(frozen=True, slots=True)
class _View:
    """The arguments of which torch rebuilds a tensor."""

    dtype: torch.dtype
    record: str
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def describe_saved(file: IO[bytes]) -> SavedTensor:
    """The tensor in a file that `torch.save` wrote.

    Raises:
        pickle.UnpicklingError: the file holds something else. Exception: whatever a damaged archive makes torch and
            pickle raise.
    """
    # Of the compiled module, whose stubs do not know all of it.
    archive: Any = torch._C.PyTorchFileReader(file)
    view = _Description(io.BytesIO(archive.get_record("data.pkl"))).load()
    if not isinstance(view, _View):
        raise pickle.UnpicklingError(f"it is a {type(view).__name__} instead of a tensor")
    offset = archive.get_record_offset(view.record) + view.first * view.dtype.itemsize
    contiguous = torch.empty(view.shape, device="meta").stride()
    # The stride of a dimension of size 1 is never used.
    used = [index for index, size in enumerate(view.shape) if size != 1]
    is_contiguous = all(view.stride[index] == contiguous[index] for index in used)
    return SavedTensor(view.shape, view.dtype, is_contiguous, offset)


class _Description(pickle.Unpickler):
    """Reads the description of a tensor; knows no other class, so that no file can make it run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return torch.storage._get_dtype_from_pickle_storage_type(name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name} instead of a tensor")

    def persistent_load(self, pid: tuple[Any, ...]) -> tuple[torch.dtype, str]:
        _, dtype, key, _, _ = pid
        return dtype, f"data/{key}"


def _rebuild(
    storage: tuple[torch.dtype, str], first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _View:
    return _View(storage[0], storage[1], first, tuple(shape), tuple(stride))
