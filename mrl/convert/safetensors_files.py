"""Folders of safetensors files: read in boxes and written in blocks, so that no tensor is ever whole in memory.

The library's own reader maps files, whose pages count as this process's memory, and its writer wants all tensors of a
file at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mrl.convert.errors import ConvertError, DamageError
from mrl.convert.raw import DigestingFile, OpenFiles, memory_of, read_matrix_box
from mrl.convert.weights import TensorInfo
from mrl.reshard.hf_export import INDEX

SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Stored:
    file: str
    offset: int


class SafetensorsFolder:
    """Weights of a Hugging Face folder; see `Weights`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        self._files = OpenFiles(self.path)
        listed = read_index(self.path)
        for file in sorted(set(listed.values())):
            header, data_start = read_header(self.path / file)
            for name, (info, start) in header.items():
                # A tensor of two files is the one that the index names.
                if listed.get(name) == file:
                    self.tensors[name] = info
                    self._stored[name] = _Stored(file, data_start + start)
        for name, file in listed.items():
            if name not in self.tensors:
                raise DamageError(f"{self.path / file}: tensor {name} is not in the file, but {INDEX} says so")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def read_into(self, target: Tensor, name: str, row: int, col: int) -> None:
        stored, info = self._stored[name], self.tensors[name]
        read_matrix_box(self._files, target, stored.file, stored.offset, cols=info.cols, row=row, col=col)


def holds_safetensors(path: Path) -> bool:
    """Whether the folder has weights in Hugging Face's format."""
    return (path / INDEX).is_file() or (path / SINGLE).is_file()


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name.

    Raises:
        ConvertError: there are no weights. DamageError: the index or the only file cannot be parsed.
    """
    if (path / INDEX).is_file():
        try:
            listed = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{path / INDEX} is not an index of safetensors files: {error!r}") from error
    if not (path / SINGLE).is_file():
        raise ConvertError(f"{path} holds no weights: neither {SINGLE} nor {INDEX} exists")
    return dict.fromkeys(read_header(path / SINGLE)[0], SINGLE)


def read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], int]:
    """Every tensor of a file with the place of its first byte, and where the data begins in the file.

    Raises:
        DamageError: the file is missing, is not safetensors, or is longer or shorter than its tensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
        size = path.stat().st_size
    except OSError as error:
        raise DamageError(f"{path} cannot be read as safetensors: {error.strerror}") from error
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _parse(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamageError(f"{path} cannot be read as safetensors: its header is damaged ({error!r})") from error
    _check_extents(path, tensors, size - 8 - length)
    return tensors, 8 + length


def _parse(entry: dict[str, Any]) -> tuple[TensorInfo, int]:
    start, stop = entry["data_offsets"]
    info = TensorInfo(tuple(int(size) for size in entry["shape"]), _DTYPES[entry["dtype"]])
    if stop - start != info.num_bytes:
        raise ValueError(f"{info.shape} {info.dtype} in {stop - start} bytes")
    return info, int(start)


def _check_extents(path: Path, tensors: Mapping[str, tuple[TensorInfo, int]], num_bytes: int) -> None:
    end = 0
    for name, (info, start) in sorted(tensors.items(), key=lambda item: (item[1][1], item[1][0].num_bytes)):
        if start != end:
            raise DamageError(f"{path}: tensor {name} begins at byte {start} of the data instead of {end}")
        end = start + info.num_bytes
        if end > num_bytes:
            raise DamageError(f"{path}: tensor {name} reaches to byte {end} of {num_bytes}; the file was cut short")
    if end != num_bytes:
        raise DamageError(f"{path} has {num_bytes} bytes of data, but its tensors take {end}")


class SafetensorsWriter:
    """One file, written tensor by tensor in the order given; a context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in tensors.items():
            offsets = [end, end + info.num_bytes]
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
            end += info.num_bytes
        text = json.dumps(header).encode()
        # Data begins at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file = DigestingFile(path, hashlib.sha256())
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, block: Tensor) -> None:
        """Write the next rows. Raises OSError as the system does."""
        self._left -= block.nbytes
        self._file.write(memory_of(block))
        self._file.check()

    def finish(self) -> str:
        """Force the file to the disk; returns its sha256."""
        assert self._left == 0, f"{self._left} bytes of the file were not written"
        os.fsync(self._file.fileno())
        return self._file.checksum()
