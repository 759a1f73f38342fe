"""Whether a Hugging Face folder or a checkpoint is whole: files, checksums, names, shapes, types, finite values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from mrl.convert.dtypes import name_of
from mrl.convert.errors import DamageError
from mrl.convert.locate import MODEL, RoleFolder, find_role, is_hugging_face
from mrl.convert.megatron_to_hf import CHECKSUMS
from mrl.convert.megatron_weights import MegatronWeights, optimizer_prefixes
from mrl.convert.progress import Advance, Track
from mrl.convert.safetensors_files import SafetensorsFolder, read_index
from mrl.convert.streaming import read_ahead
from mrl.convert.weights import Weights, check_tensors, read_rows, row_blocks
from mrl.reshard.families import tensor_shapes
from mrl.reshard.hf_export import INDEX
from mrl.reshard.spec import load_spec
from mrl.trainer.damage import verify_with_tensors
from mrl.trainer.manifest import MANIFEST, Manifest, RoleRecord, read_manifest


def verify(path: Path, *, hf: Path | None, track: Track) -> list[str]:
    """Read all of a folder and check it against what describes it; returns lines that say what was checked.

    Args:
        hf: folder with config.json for a checkpoint that has neither that nor a manifest.

    Raises:
        DamageError, CheckpointError: names the first file, and the tensor, that is not as it should be.
        ConvertError: the path is neither a Hugging Face folder nor a checkpoint.
    """
    path = path.expanduser().absolute()
    if is_hugging_face(path):
        return list(_verify_hugging_face(path, track))
    if (path / MANIFEST).is_file():
        return list(_verify_whole(path, track))
    return list(_verify_role(find_role(path), hf, track))


def verify_checksums(checkpoint: Path, manifest: Manifest, track: Track) -> None:
    """Raise CheckpointError naming the first file of a checkpoint that is not as the manifest says."""
    with track("checksums", sum(record.num_bytes for record in manifest.files.values())) as advance:
        for name, record in manifest.files.items():
            verify_with_tensors(checkpoint, manifest.files, [name])
            advance(record.num_bytes)


def _verify_whole(path: Path, track: Track) -> Iterator[str]:
    manifest = read_manifest(path)
    # A role of an older checkpoint may have been removed on purpose, whole.
    kept = {role for role in manifest.roles if role == MODEL or (path / role).is_dir()}
    if not kept:
        raise DamageError(f"{path}: none of the roles {', '.join(manifest.roles)} of its {MANIFEST} is there")
    files = {name: record for name, record in manifest.files.items() if _role_of(name, manifest) in {None, *kept}}
    verify_checksums(path, Manifest(**{**vars(manifest), "files": files}), track)
    yield f"{len(files)} files have the sizes and checksums of {MANIFEST}"
    for role in manifest.roles:
        if role in kept:
            yield from _verify_role(find_role(path if role == MODEL else path / role), None, track)
        else:
            yield f"{role}: removed, as trainer.max_{role}_ckpt_to_keep says"


def _role_of(name: str, manifest: Manifest) -> str | None:
    first = Path(name).parts[0]
    return first if first in manifest.roles else None


def _verify_role(source: RoleFolder, hf: Path | None, track: Track) -> Iterator[str]:
    spec = source.spec(hf)
    with ExitStack() as stack:
        weights = stack.enter_context(MegatronWeights(source.dist, spec))
        views: list[Weights] = [weights]
        if source.record is not None:
            _check_record(weights, source.record)
        for prefix in optimizer_prefixes(weights.checkpoint):
            views.append(stack.enter_context(MegatronWeights(source.dist, spec, prefix=prefix)))
        _check_finite(views, f"values of the {source.role}", track)
    state = f" and {len(views) - 1} tensors of optimizer state for each" if len(views) > 1 else ""
    described = (
        f"as {MANIFEST} says" if source.record else f"as config.json says, without checksums for want of {MANIFEST}"
    )
    yield f"{source.role}: {len(weights.tensors)} tensors {described}{state}; all values are finite"


def _check_record(weights: MegatronWeights, record: RoleRecord) -> None:
    for name, expected in record.tensors.items():
        info = weights.tensors.get(name)
        found = "absent" if info is None else f"{list(info.shape)} {name_of(info.dtype)}"
        wanted = f"{list(expected['shape'])} {expected['dtype']}"
        if found != wanted:
            raise DamageError(f"{weights.path}: tensor {name} is {found}, but {MANIFEST} says {wanted}")


def _verify_hugging_face(path: Path, track: Track) -> Iterator[str]:
    with SafetensorsFolder(path) as weights:
        _check_unlisted(path)
        if (path / CHECKSUMS).is_file():
            yield f"{_check_sums(path, track)} files have the checksums of {CHECKSUMS}"
        yield _check_config(path, weights)
        _check_finite([weights], "values", track)
        yield f"{len(weights.tensors)} tensors; all values are finite"


def _check_config(path: Path, weights: Weights) -> str:
    if not (path / "config.json").is_file():
        raise DamageError(f"{path / 'config.json'} is missing")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        _check_json(path / name)
    try:
        shapes = tensor_shapes(load_spec(path))
    except ValueError as error:
        return f"shapes are not compared with config.json: {error}"
    check_tensors(weights, shapes)
    return f"{len(shapes)} tensors have the shapes that config.json gives"


def _check_json(path: Path) -> None:
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(f"{path} is not JSON: {error}") from error


def _check_unlisted(path: Path) -> None:
    """Whatever loads all files of a folder would find more than the index names."""
    listed = set(read_index(path).values())
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in listed:
            raise DamageError(f"{file} is not in {INDEX}; remove it, or complete the index")


def _check_sums(path: Path, track: Track) -> int:
    try:
        lines = (path / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        num_bytes = sum((path / name).stat().st_size for name in expected)
    except (ValueError, OSError) as error:
        raise DamageError(f"{path / CHECKSUMS}: {error}") from error
    unlisted = set(read_index(path).values()) - set(expected)
    if unlisted:
        raise DamageError(f"{path / CHECKSUMS} does not list {min(unlisted)}")
    with track("checksums", num_bytes) as advance:
        for name, digest in expected.items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DamageError(f"{path / name} is damaged: its checksum is not that of {CHECKSUMS}")
            advance((path / name).stat().st_size)
    return len(expected)


def _check_finite(views: list[Weights], what: str, track: Track) -> None:
    num_bytes = sum(info.num_bytes for weights in views for info in weights.tensors.values())
    with track(what, num_bytes) as advance:
        for weights in views:
            for name in weights.tensors:
                _check_finite_tensor(weights, name, advance)


def _check_finite_tensor(weights: Weights, name: str, advance: Advance) -> None:
    info = weights.tensors[name]
    blocks = (
        (len(rows) * info.cols * info.dtype.itemsize, partial(read_rows, weights, name, rows))
        for rows in row_blocks(info)
    )
    first = 0
    for block in read_ahead(blocks):
        if block.is_floating_point() and not bool(torch.isfinite(block).all()):
            row = first + int((~torch.isfinite(block)).any(dim=1).nonzero()[0])
            raise DamageError(f"{weights.path}: tensor {name} has a value that is not finite in row {row}")
        first += block.shape[0]
        advance(block.nbytes)
