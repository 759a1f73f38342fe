"""Verifying a checkpoint's files, and saying which tensor suffers where one is damaged."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from mrl.interfaces import CheckpointError
from mrl.trainer.manifest import FileRecord, verify_files

_METADATA, _TENSOR_FILES = ".metadata", ".distcp"


def verify_with_tensors(folder: Path, files: Mapping[str, FileRecord], names: Sequence[str]) -> None:
    """Verify the named files of a checkpoint.

    Raises:
        CheckpointError: names the first file that is missing, cut short or changed and, where its neighbours tell, the
            first damaged tensor in it.
    """
    for name in names:
        try:
            verify_files(folder, {name: files[name]})
        except CheckpointError as error:
            if tensor := first_damaged_tensor(folder, name, files):
                raise CheckpointError(f"tensor {tensor}: {error}") from error
            raise


def first_damaged_tensor(folder: Path, name: str, files: Mapping[str, FileRecord]) -> str | None:
    """The first tensor in the file whose own checksum, which `torch.save` adds, does not fit its bytes.

    None if there is no such tensor, the file holds none, or the description of what it holds is damaged itself.
    """
    path = folder / name
    described_by = str(Path(name).with_name(_METADATA))
    if path.suffix != _TENSOR_FILES or not path.is_file() or described_by not in files:
        return None
    try:
        verify_files(folder, {described_by: files[described_by]})
    except CheckpointError:
        return None
    places = FileSystemReader(path.parent).read_metadata().storage_data
    inside = [
        (place.offset, place.length, index) for index, place in places.items() if place.relative_path == path.name
    ]
    with path.open("rb") as file:
        for offset, length, index in sorted(inside, key=lambda item: item[0]):
            file.seek(offset)
            if not _is_sound(file.read(length)):
                where = list(index.offset) if index.offset else "whole"
                return f"{index.fqn} (part at {where})"
    return None


def _is_sound(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError):
        return False
