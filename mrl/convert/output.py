"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mrl.convert.errors import ConvertError
from mrl.trainer.manifest import sync_folder

_MARGIN_BYTES = 64 * 2**20
"""For configuration, tokenizer and what the formats add."""


@contextmanager
def output_folder(path: Path, *, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `path` to write into, which takes that name when the block ends well.

    Whatever else ends the block, an interrupt included, nothing is left, and what was at `path` stays.

    Args:
        num_bytes: what will be written; refused if the disk has less.
        overwrite: replace what is at `path`.

    Raises:
        ConvertError: `path` is a file or not empty, or the disk has too little space.
    """
    path = path.expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    _check_target(path, overwrite=overwrite)
    _check_space(path.parent, num_bytes)
    scratch = _beside(path, "converting")
    scratch.mkdir()
    try:
        yield scratch
        for folder in (scratch, *(item for item in scratch.rglob("*") if item.is_dir())):
            sync_folder(folder)
        _publish(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_target(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ConvertError(f"{path} exists and is no folder; choose another --out")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConvertError(f"{path} exists and is not empty; choose another --out or add --overwrite")


def _check_space(folder: Path, num_bytes: int) -> None:
    needed, free = num_bytes + num_bytes // 100 + _MARGIN_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ConvertError(
            f"the output needs {needed / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB free; free some or "
            "choose another --out"
        )


def _publish(scratch: Path, path: Path) -> None:
    """Give `scratch` its name; a folder that has it is moved aside first, and back if that fails."""
    if path.exists():
        replaced = _beside(path, "replaced")
        try:
            path.rename(replaced)
            scratch.rename(path)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(replaced)
    else:
        scratch.rename(path)
        sync_folder(path.parent)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{os.getpid()}")


def _clear_leftovers(path: Path) -> None:
    """Undo what conversions to the same place that were killed have left."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(converting|replaced)-(\d+)$")
    for item in sorted(path.parent.iterdir()):
        match = pattern.match(item.name)
        if match and not psutil.pid_exists(int(match[2])):
            if match[1] == "replaced" and not path.exists():
                item.rename(path)
            else:
                shutil.rmtree(item)
