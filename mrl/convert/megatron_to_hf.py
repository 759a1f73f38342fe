"""The weights of a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mrl.convert.dtypes import name_of, one_dtype
from mrl.convert.errors import ConvertError
from mrl.convert.locate import RoleFolder, find_role
from mrl.convert.megatron_weights import MegatronWeights
from mrl.convert.output import output_folder
from mrl.convert.progress import Advance, Track
from mrl.convert.safetensors_files import SafetensorsWriter
from mrl.convert.streaming import read_ahead
from mrl.convert.weights import TensorInfo, Weights, read_rows, row_blocks
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.hf_export import ExportFile, copy_model_files, plan_files, write_index
from mrl.reshard.spec import ModelSpec, load_spec
from mrl.trainer.manifest import MANIFEST

CHECKSUMS = "SHA256SUMS"
"""What `sha256sum -c` reads; the format of weights has no checksums of its own."""
# More than a layer and less than what is unwieldy to download.
_MAX_FILE_BYTES = 5 * 10**9


def convert_to_hugging_face(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path | None,
    dtype: torch.dtype | None,
    overwrite: bool,
    track: Track,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Write a folder that transformers and SGLang load.

    Args:
        hf: folder with config.json, tokenizer and generation settings; None takes those that the checkpoint carries.
        dtype: of the folder; None keeps the checkpoint's.

    Raises:
        ValueError: a model, checkpoint or output that cannot be; says which.
        OSError: something could not be written.
    """
    source = find_role(checkpoint)
    model_files = _model_files(source, hf)
    spec = _checked_spec(source, model_files)
    with MegatronWeights(source.dist, spec) as weights:
        if weights.is_critic:
            raise ConvertError(
                f"{source.dist} is a critic's: a value head has no place in a Hugging Face causal model; give the "
                "actor's folder"
            )
        target = dtype or one_dtype(weights, weights.tensors)
        files = plan_files(
            spec,
            ParallelLayout(world_size=1),
            bytes_per_element=target.itemsize,
            max_file_bytes=max_file_bytes,
        )
        num_bytes = sum(file.num_bytes for file in files)
        with output_folder(out, num_bytes=num_bytes, overwrite=overwrite) as folder:
            with track(f"writing {out}", num_bytes) as advance:
                sums = {file.name: _write_file(folder, file, weights, target, advance) for file in files}
            write_index(folder, files)
            copy_model_files(model_files, model_files, folder, dtype=name_of(target))
            _write_checksums(folder, sums)


def _write_file(folder: Path, file: ExportFile, weights: Weights, dtype: torch.dtype, advance: Advance) -> str:
    """Write one file block by block; returns its sha256."""
    tensors = {name: TensorInfo(weights.tensors[name].shape, dtype) for name in file.tensors}
    with SafetensorsWriter(folder / file.name, tensors) as writer:
        for block in read_ahead(_blocks(weights, file.tensors)):
            converted = block.to(dtype)
            writer.append(converted)
            advance(converted.nbytes)
        return writer.finish()


def _blocks(weights: Weights, names: tuple[str, ...]) -> Iterator[tuple[int, partial[Tensor]]]:
    for name in names:
        info = weights.tensors[name]
        for rows in row_blocks(info):
            yield len(rows) * info.cols * info.dtype.itemsize, partial(read_rows, weights, name, rows)


def _model_files(source: RoleFolder, hf: Path | None) -> Path:
    folder = hf or source.model_files
    if folder is None:
        raise ConvertError(
            f"{source.dist} carries no config.json and tokenizer; give the folder of the model that was trained as --hf"
        )
    return folder


def _checked_spec(source: RoleFolder, model_files: Path) -> ModelSpec:
    """The spec of config.json, which has to be that of the manifest."""
    spec = load_spec(model_files)
    if source.record is None:
        return spec
    saved = ModelSpec.from_json(source.record.spec)
    for name, value in spec.to_json().items():
        # A longer context changes no weight.
        if name != "max_position_embeddings" and saved.to_json()[name] != value:
            raise ConvertError(
                f"{model_files / 'config.json'} is of another model than {source.dist}: its {name} is {value}, "
                f"{MANIFEST} has {saved.to_json()[name]}; give the folder of the model that was trained as --hf"
            )
    return spec


def _write_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Of every file; those of the weights are known."""
    for path in sorted(folder.iterdir()):
        if path.name not in sums:
            sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")
