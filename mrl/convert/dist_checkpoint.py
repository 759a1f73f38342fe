"""Reading a torch_dist checkpoint of megatron-core in boxes: no process group, no megatron, no whole tensor in memory.

The metadata is read by torch.distributed.checkpoint. A stored shard is a file that `torch.save` wrote, at an offset in
a larger file; its tensor's bytes lie in it uncompressed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from mrl.convert.errors import ConvertError, DamageError
from mrl.convert.raw import OpenFiles, read_matrix_box
from mrl.convert.saved_tensor import SavedTensor, describe_saved
from mrl.convert.weights import TensorInfo

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a stored tensor, or a pickled object, and the bytes of the file that hold it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(kw_only=True, frozen=True)
class StoredTensor:
    """A whole tensor, of whatever number of dimensions, and its shards."""

    info: TensorInfo
    shards: list[Shard] = field(default_factory=list)


class DistCheckpoint:
    """The contents of one torch_dist folder; a context manager.

    Raises:
        ConvertError: the folder is no such checkpoint. DamageError: its metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = OpenFiles(folder)
        self._data_offsets: dict[Shard, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: dict[str, Shard] = {}
        metadata = read_metadata(folder)
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = self._stored_tensor(key, entry, metadata)
            elif isinstance(entry, BytesStorageMetadata):
                self.objects[key] = self._shard(key, (), (), metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def shards(self) -> list[Shard]:
        """Everything that is stored, in the order of the files."""
        tensors = [shard for tensor in self.tensors.values() for shard in tensor.shards]
        return sorted([*tensors, *self.objects.values()], key=lambda shard: (shard.file, shard.offset))

    def read_into(self, target: Tensor, key: str, lead: tuple[int, ...], row: int, col: int) -> None:
        """Fill `target`, [rows, cols], with the box at (row, col) of the matrix at the leading indices `lead`.

        Raises:
            DamageError: a shard is missing, cut short or not what the metadata says.
        """
        missing = target.numel()
        bottom, right = row + target.shape[0], col + target.shape[1]
        for shard in self.tensors[key].shards:
            plane = _plane(shard, lead)
            if plane is None:
                continue
            first, (shard_row, shard_col, rows, cols) = plane
            top, end = max(row, shard_row), min(bottom, shard_row + rows)
            left, stop = max(col, shard_col), min(right, shard_col + cols)
            if top < end and left < stop:
                part = target[top - row : end - row, left - col : stop - col]
                start = self._data_offset(shard) + first * target.itemsize
                read_matrix_box(
                    self._files, part, shard.file, start, cols=cols, row=top - shard_row, col=left - shard_col
                )
                missing -= part.numel()
        if missing:
            raise DamageError(f"{self.folder}: {missing} elements of tensor {key} are in no file")

    def read_object(self, key: str) -> bytes:
        """A pickled object as it is stored."""
        shard = self.objects[key]
        return self._files.read_bytes(shard.file, shard.offset, shard.length)

    def check(self, shard: Shard) -> None:
        """Raise DamageError if the tensor in the file is not what the metadata says."""
        self._data_offset(shard)

    def _data_offset(self, shard: Shard) -> int:
        """The place of the shard's first element in its file."""
        if shard not in self._data_offsets:
            path = self.folder / shard.file
            expected = self.tensors[shard.key].info.dtype
            described = self._describe(shard)
            if described.shape != shard.sizes or described.dtype != expected:
                raise DamageError(
                    f"{path}: tensor {shard.key} at {list(shard.offsets)} is {list(described.shape)} "
                    f"{described.dtype}, but the metadata says {list(shard.sizes)} {expected}"
                )
            if not described.is_contiguous:
                raise ConvertError(f"{path}: tensor {shard.key} is not stored row by row")
            self._data_offsets[shard] = shard.offset + described.offset
        return self._data_offsets[shard]

    def _describe(self, shard: Shard) -> SavedTensor:
        path = self.folder / shard.file
        try:
            with path.open("rb") as file:
                view = _create_file_view(cast(io.IOBase, file), shard.offset, shard.length)
                return describe_saved(cast(IO[bytes], view))
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror or error}") from error
        # Whatever a damaged archive makes torch and pickle raise.
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise DamageError(f"{path}: tensor {shard.key} at {list(shard.offsets)} cannot be read: {first}") from error

    def _stored_tensor(self, key: str, entry: TensorStorageMetadata, metadata: Metadata) -> StoredTensor:
        shards = [
            self._shard(key, tuple(chunk.offsets), tuple(chunk.sizes), metadata)
            for chunk in entry.chunks
            # Ranks that hold nothing of a tensor store an empty shard.
            if chunk.sizes.numel()
        ]
        return StoredTensor(info=TensorInfo(tuple(entry.size), entry.properties.dtype), shards=shards)

    def _shard(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], metadata: Metadata) -> Shard:
        index = MetadataIndex(key, torch.Size(offsets)) if offsets or sizes else MetadataIndex(key)
        try:
            place = metadata.storage_data[index]
        except KeyError:
            raise DamageError(
                f"{self.folder / METADATA} is damaged: it names no file for {key} at {list(offsets)}"
            ) from None
        if place.transform_descriptors:
            raise ConvertError(f"{self.folder}: {key} is stored compressed, which is not supported")
        return Shard(key, offsets, sizes, place.relative_path, place.offset, place.length)


def holds_dist_checkpoint(folder: Path) -> bool:
    """Whether the folder itself is a torch_dist checkpoint."""
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a torch_dist folder."""
    if not holds_dist_checkpoint(folder):
        raise ConvertError(f"{folder} is not a torch_dist checkpoint: {folder / METADATA} does not exist")
    try:
        metadata = FileSystemReader(folder).read_metadata()
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise TypeError(f"it holds a {type(metadata).__name__}")
    # Whatever a damaged pickle makes pickle raise.
    except Exception as error:
        raise DamageError(f"{folder / METADATA} is damaged: {error!r}") from error
    return metadata


def _plane(shard: Shard, lead: Sequence[int]) -> tuple[int, tuple[int, int, int, int]] | None:
    """Where the matrix at `lead` begins in a shard, in elements, and its box (row, col, rows, cols); None if elsewhere.

    [n] counts as [n, 1].
    """
    count, index = len(lead), 0
    for at, offset, size in zip(lead, shard.offsets, shard.sizes, strict=False):
        if not offset <= at < offset + size:
            return None
        index = index * size + at - offset
    row, *rest = shard.offsets[count:] or (0,)
    rows, *cols = shard.sizes[count:] or (1,)
    width = cols[0] if cols else 1
    return index * rows * width, (row, rest[0] if rest else 0, rows, width)
