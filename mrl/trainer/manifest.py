"""What a checkpoint says of itself: its roles' tensors, its files with their checksums, and who wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mrl.interfaces import CheckpointError
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import tensor_shapes
from mrl.reshard.families.decoder import LM_HEAD
from mrl.reshard.spec import ModelSpec
from mrl.trainer.checkpoint_files import MANIFEST

_FORMAT = 2
_PACKAGES = ("mrl", "torch", "megatron-core", "sglang", "transformers")
_BYTES_PER_PARAMETER = {"float32": 4 + 8, "bfloat16": 2 + 4 + 8}
"""The weight, a float32 copy of it where it is of another type, and two float32 moments."""
# A longer context changes no weight.
_FREE_SPEC_FIELDS = ("max_position_embeddings",)

Tensors = dict[str, dict[str, Any]]


@dataclass(kw_only=True, frozen=True)
class RoleRecord:
    """What a role's part of a checkpoint holds; its layout is for information, any other loads it."""

    spec: dict[str, Any]
    dtype: str
    distributed_optimizer: bool
    layout: dict[str, Any]
    tensors: Tensors

    @property
    def num_bytes(self) -> int:
        """Parameters and optimizer state, without what the file format adds."""
        return _BYTES_PER_PARAMETER[self.dtype] * sum(math.prod(tensor["shape"]) for tensor in self.tensors.values())


@dataclass(kw_only=True, frozen=True)
class FileRecord:
    """Size and checksum of one file."""

    num_bytes: int
    xxh128: str
    """Of its bytes. Against damage, not against forgery; ten times as fast as what would do the latter."""


@dataclass(kw_only=True, frozen=True)
class Manifest:
    """The contents of manifest.json."""

    step: int
    """PPO steps made."""
    weight_version: int
    roles: dict[str, RoleRecord]
    files: dict[str, FileRecord]
    """By path relative to the checkpoint's folder."""
    packages: dict[str, str] = field(default_factory=lambda: installed_packages())


def describe_role(
    spec: ModelSpec, layout: ParallelLayout, *, dtype: str, distributed_optimizer: bool, is_critic: bool
) -> RoleRecord:
    """The record of a role as it is configured now."""
    shapes = tensor_shapes(spec)
    if is_critic:
        shapes.pop(LM_HEAD, None)
        shapes |= {"value_head.weight": (1, spec.hidden_size), "value_head.bias": (1,)}
    return RoleRecord(
        spec=spec.to_json(),
        dtype=dtype,
        distributed_optimizer=distributed_optimizer,
        layout=asdict(layout),
        tensors={name: {"shape": list(shape), "dtype": dtype} for name, shape in shapes.items()},
    )


def installed_packages() -> dict[str, str]:
    """Versions of what a checkpoint's contents may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` with a checksum of its own."""
    contents = {"format": _FORMAT, **asdict(manifest)}
    text = json.dumps({**contents, "sha256": _digest(contents)}, indent=1)
    write_durably(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or its format is of another version.
    """
    path = folder / MANIFEST
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        expected = contents.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {path}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(_damaged(path, f"it cannot be parsed ({error})")) from error
    if _digest(contents) != expected:
        raise CheckpointError(_damaged(path, "its checksum differs"))
    if contents["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {contents['format']}, this version reads {_FORMAT}; resume with the mrl that wrote it, "
            f"{contents['packages']['mrl']}"
        )
    return Manifest(
        step=contents["step"],
        weight_version=contents["weight_version"],
        roles={name: RoleRecord(**record) for name, record in contents["roles"].items()},
        files={name: FileRecord(**record) for name, record in contents["files"].items()},
        packages=contents["packages"],
    )


def new_checksum() -> xxhash.xxh3_128:
    """What computes a file's checksum, in the manner of `hashlib`; for whoever writes a file piece by piece."""
    return xxhash.xxh3_128()


def list_files(folder: Path) -> list[str]:
    """Relative paths of all files of a checkpoint but its manifest, sorted."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if str(path) != MANIFEST)


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and checksum of the named files, each forced to the disk first."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = _checksum(file)
            records[name] = FileRecord(num_bytes=file.tell(), xxh128=digest)
    return records


def verify_files(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise CheckpointError naming the first file that is missing, cut short or changed."""
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.num_bytes:
                raise CheckpointError(_damaged(path, f"it has {size} bytes instead of {expected.num_bytes}"))
            with path.open("rb") as file:
                digest = _checksum(file)
        except OSError as error:
            raise CheckpointError(_damaged(path, error.strerror or str(error))) from error
        if digest != expected.xxh128:
            raise CheckpointError(_damaged(path, "its checksum differs"))


def check_role(role: str, saved: RoleRecord, current: RoleRecord, folder: Path) -> None:
    """Raise CheckpointError naming the first tensor or setting of `role` that the checkpoint has otherwise."""
    for name, tensor in current.tensors.items():
        if tensor != saved.tensors.get(name):
            _refuse(folder, f"{role} tensor {name}", _tensor(saved.tensors.get(name)), _tensor(tensor))
    for name, tensor in saved.tensors.items():
        if name not in current.tensors:
            _refuse(folder, f"{role} tensor {name}", _tensor(tensor), "absent")
    for name, value in current.spec.items():
        if name not in _FREE_SPEC_FIELDS and saved.spec.get(name) != value:
            _refuse(folder, f"{role} model's {name}", saved.spec.get(name), value)
    if saved.distributed_optimizer != current.distributed_optimizer:
        _refuse(
            folder,
            f"{role} megatron.use_distributed_optimizer",
            saved.distributed_optimizer,
            current.distributed_optimizer,
        )


def compare_packages(manifest: Manifest) -> list[str]:
    """One phrase for each package that is now installed in another version."""
    now = installed_packages()
    return [f"{name} {old} (now {now.get(name)})" for name, old in manifest.packages.items() if now.get(name) != old]


def compare_files(manifest: Manifest, prefix: str, current: Mapping[str, Path]) -> list[str]:
    """Names of `current` that the checkpoint has not, or with other contents, under `prefix`."""
    changed = []
    for name, path in current.items():
        saved = manifest.files.get(prefix + name)
        if saved is None or saved.num_bytes != path.stat().st_size:
            changed.append(name)
            continue
        with path.open("rb") as file:
            if _checksum(file) != saved.xxh128:
                changed.append(name)
    return changed


def write_durably(path: Path, text: str) -> None:
    """Write a file so that after a crash it is either whole or, as before, not there."""
    scratch = path.with_name(f".{path.name}.saving")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force renames and new names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(folder: Path, what: str, saved: object, current: object) -> None:
    raise CheckpointError(
        f"checkpoint {folder} belongs to another model or setting: {what} is {saved} there and {current} here; set "
        "trainer.resume_mode=disable or another trainer.default_local_dir to start anew, or restore the configuration"
    )


def _damaged(path: Path, why: str) -> str:
    return (
        f"checkpoint file {path} is damaged: {why}; set trainer.resume_mode=resume_path and trainer.resume_from_path "
        "to an older checkpoint"
    )


def _tensor(record: Mapping[str, Any] | None) -> str:
    return f"{record['shape']} {record['dtype']}" if record else "absent"


def _checksum(file: BinaryIO) -> str:
    return hashlib.file_digest(file, new_checksum).hexdigest()  # type: ignore[arg-type]


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
