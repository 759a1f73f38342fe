"""Writing a torch_dist checkpoint shard by shard, each made when it is its turn, as if the ranks of a layout had.

torch.distributed.checkpoint writes the files and the metadata; no process group is needed for that.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mrl.convert.cuts import Box
from mrl.convert.dist_checkpoint import METADATA
from mrl.convert.names import Parameter
from mrl.convert.raw import DigestingFile
from mrl.convert.streaming import read_ahead
from mrl.trainer.manifest import FileRecord, record_files

_FORMAT_FILE = "metadata.json"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(kw_only=True, frozen=True)
class NewShard:
    """A box of a tensor that is to be written."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]
    """Returns the box; called once, in another thread."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def shards_of(
    parameter: Parameter, boxes: Iterable[Box], dtype: torch.dtype, read: Callable[[Box], Tensor]
) -> Iterator[NewShard]:
    """The shards that store these boxes of a parameter.

    Args:
        read: returns a box, [rows, cols]; called when it is written.
    """
    place = parameter.place
    for box in boxes:
        is_vector = len(parameter.shape) == 1
        sizes = (*(1 for _ in place.lead), *((box.rows,) if is_vector else (box.rows, box.cols)))
        yield NewShard(
            key=place.key,
            shape=(*place.counts, *parameter.shape),
            dtype=dtype,
            offsets=(*place.lead, *((box.row,) if is_vector else (box.row, box.col))),
            sizes=sizes,
            make=partial(_make, read, box, sizes),
        )


@dataclass(kw_only=True, frozen=True)
class NewObject:
    """A pickled object that is to be written."""

    key: str
    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)


def write_dist_checkpoint(
    folder: Path, ranks: Sequence[Sequence[NewShard | NewObject]], advance: Callable[[int], None]
) -> dict[str, FileRecord]:
    """Write one file per rank, and the metadata, into an existing folder; returns sizes and checksums.

    In memory are the shard that is written and those read ahead.

    Args:
        advance: called with the bytes of each shard.

    Raises:
        OSError: as the system says.
    """
    files = _Files()
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [SavePlan([_write_item(item) for item in _in_writing_order(items)]) for items in ranks]
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = []
    for plan, items in zip(plans, ranks, strict=True):
        with _Source(_in_writing_order(items), files, advance) as source:
            results.append(writer.write_data(plan, source).value())
    writer.finish(metadata, results)
    (folder / _FORMAT_FILE).write_text(json.dumps(_FORMAT), encoding="utf-8")
    shards = {name: record for name, record in files.records.items() if not name.startswith(METADATA)}
    return shards | record_files(folder, [METADATA, _FORMAT_FILE])


class _Files(FileSystem):
    """Opens files that are checksummed while they are written."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.current: DigestingFile | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "nothing is read through this"
        with DigestingFile(Path(path), xxhash.xxh3_128()) as file:
            self.current = file
            yield file
            self.current = None
            self.records[Path(path).name] = FileRecord(num_bytes=file.num_bytes, xxh128=file.checksum())


class _Source(DefaultSavePlanner):
    """Hands the writer the data of one rank's items, in order."""

    def __init__(self, items: Sequence[NewShard | NewObject], files: _Files, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._data = read_ahead((item.num_bytes, _making(item)) for item in items)
        self._files = files
        self._advance = advance
        self._last: Tensor | None = None

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The data of the next item; raises the OSError that writing an earlier one met."""
        if self._files.current is not None:
            self._files.current.check()
        # The writer keeps every tensor until its file is complete. This one is written: its memory is taken back.
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        data = next(self._data)
        self._last = data if isinstance(data, Tensor) else None
        self._advance(data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes)
        return data


def _make(read: Callable[[Box], Tensor], box: Box, sizes: tuple[int, ...]) -> Tensor:
    return read(box).view(sizes)


def _in_writing_order(items: Sequence[NewShard | NewObject]) -> list[NewShard | NewObject]:
    """The writer asks for a file's objects before its tensors."""
    return sorted(items, key=lambda item: isinstance(item, NewShard))


def _making(item: NewShard | NewObject) -> Callable[[], Tensor | io.BytesIO]:
    return item.make if isinstance(item, NewShard) else partial(io.BytesIO, item.data)


def _write_item(item: NewShard | NewObject) -> WriteItem:
    if isinstance(item, NewObject):
        return WriteItem(MetadataIndex(item.key), WriteItemType.BYTE_IO)
    offsets, sizes = torch.Size(item.offsets), torch.Size(item.sizes)
    return WriteItem(
        MetadataIndex(item.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=item.dtype),
            size=torch.Size(item.shape),
        ),
    )
