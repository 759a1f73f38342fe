"""Reading and writing the bytes of tensors without a copy: into their own memory, at an offset, checked for length."""

from __future__ import annotations

import ctypes
import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mrl.convert.errors import DamageError

_MAX_OPEN_FILES = 64
# The kernel moves at most 2 GiB at a time.
_MAX_TRANSFER_BYTES = 2**30
_WRITE_BACK_BYTES = 32 * 2**20


class Digest(Protocol):
    """A checksum in the making, as hashlib and xxhash have them."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class OpenFiles:
    """Files of one folder, opened when they are read; the least recently used are closed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read_into(self, target: Tensor, name: str, offset: int) -> None:
        """Fill a contiguous CPU tensor with the bytes of file `name` from `offset` on.

        Raises:
            DamageError: the file is missing or too short.
        """
        memory = memory_of(target)
        descriptor, done = self._descriptor(name), 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done : done + _MAX_TRANSFER_BYTES]], offset + done)
            if count == 0:
                raise DamageError(
                    f"{self.folder / name} ends at byte {offset + done}, but a tensor in it reaches to byte "
                    f"{offset + len(memory)}; the file was cut short"
                )
            done += count

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of file `name`."""
        target = torch.empty(length, dtype=torch.uint8)
        self.read_into(target, name, offset)
        return target.numpy().tobytes()

    def _descriptor(self, name: str) -> int:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
            return self._descriptors[name]
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError as error:
            raise DamageError(f"{self.folder / name} cannot be read: {error.strerror}") from error
        if len(self._descriptors) == _MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[name] = descriptor
        return descriptor


class DigestingFile(io.FileIO):
    """A file that is written once, from its beginning, and keeps its checksum and its first error.

    An error of the system is kept instead of raised, and what follows is dropped: torch.save writes from C++, where
    the error would be lost. Whoever writes asks for it with `check`.
    """

    def __init__(self, path: Path, digest: Digest) -> None:
        super().__init__(path, "wb")
        self.num_bytes = 0
        self._written_back = 0
        self._digest = digest
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        memory = memoryview(data).cast("B")
        done = 0
        try:
            while self._error is None and done < len(memory):
                count = super().write(memory[done : done + _WRITE_BACK_BYTES])
                self._digest.update(memory[done : done + count])
                self.num_bytes += count
                done += count
                self._start_write_back()
        except OSError as error:
            self._error = error
        return len(memory)

    def _start_write_back(self) -> None:
        """Have the system write what it holds, and drop it, instead of keeping it until `fsync`.

        That was four times as fast, and leaves the memory of other programs' files alone.
        """
        if self.num_bytes - self._written_back >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), 0, self.num_bytes, os.POSIX_FADV_DONTNEED)
            self._written_back = self.num_bytes

    def check(self) -> None:
        """Raise the OSError of an earlier write."""
        if self._error is not None:
            raise self._error

    def checksum(self) -> str:
        """Of all that was written, in hexadecimal. Raises as `check`."""
        self.check()
        return self._digest.hexdigest()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place; usable while the tensor lives."""
    assert tensor.is_contiguous(), "only a contiguous tensor has its bytes in one run"
    # Not through numpy, after which the storage could no longer be resized.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_matrix_box(
    files: OpenFiles,
    target: Tensor,
    name: str,
    offset: int,
    *,
    cols: int,
    row: int,
    col: int,
    scratch_bytes: int = 16 * 2**20,
) -> None:
    """Fill `target`, [rows, n], with the box at (row, col) of a matrix of `cols` columns stored by rows at `offset`."""
    start = offset + row * cols * target.itemsize
    if target.shape[1] == cols and target.is_contiguous():
        files.read_into(target, name, start)
        return
    step = max(1, scratch_bytes // (cols * target.itemsize))
    scratch = torch.empty(min(step, target.shape[0]), cols, dtype=target.dtype)
    for first in range(0, target.shape[0], step):
        count = min(step, target.shape[0] - first)
        files.read_into(scratch[:count], name, start + first * cols * target.itemsize)
        target[first : first + count].copy_(scratch[:count, col : col + target.shape[1]])
