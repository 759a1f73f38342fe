"""What a path given to the tools is, and where its model's configuration is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mrl.convert.dist_checkpoint import holds_dist_checkpoint
from mrl.convert.errors import ConvertError
from mrl.convert.safetensors_files import holds_safetensors
from mrl.reshard.spec import ModelSpec, load_spec
from mrl.trainer.manifest import MANIFEST, Manifest, RoleRecord, read_manifest
from mrl.trainer.resume import HUGGING_FACE

ENGINE_STATE = "dist_ckpt"
MODEL = "model"
"""The role of a checkpoint that is a converted model instead of a part of a run."""


@dataclass(kw_only=True, frozen=True)
class RoleFolder:
    """One role of a checkpoint."""

    dist: Path
    """The torch_dist folder."""
    role: str
    """"actor", "critic", or "model" for a converted one."""
    record: RoleRecord | None
    """From the manifest, if there is one."""
    model_files: Path | None
    """Folder with config.json and tokenizer that the checkpoint carries."""

    def spec(self, hf: Path | None) -> ModelSpec:
        """The model's spec: from the manifest, from the files carried, or from the folder `hf`.

        Raises:
            ConvertError: nothing says what the model is.
        """
        if self.record is not None:
            return ModelSpec.from_json(self.record.spec)
        folder = hf or self.model_files
        if folder is None:
            raise ConvertError(
                f"{self.dist} comes with neither {MANIFEST} nor {HUGGING_FACE}/config.json, so its model is not known; "
                "give a folder with its config.json as --hf"
            )
        return load_spec(folder)


def is_hugging_face(path: Path) -> bool:
    """Whether the path is a folder of Hugging Face weights, not a checkpoint."""
    return holds_safetensors(path)


def is_checkpoint(path: Path) -> bool:
    """Whether `find_role` finds a torch_dist folder there."""
    places = (path, path / ENGINE_STATE, path / "actor" / ENGINE_STATE)
    return any(holds_dist_checkpoint(place) for place in places)


def find_role(path: Path, *, role: str | None = None) -> RoleFolder:
    """The role that a path means: a checkpoint's folder, a role's folder in it, its torch_dist folder, or a converted
    model.

    Args:
        role: which one of a whole checkpoint; by default the actor.

    Raises:
        ConvertError: the path is none of these. CheckpointError: its manifest is damaged.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise ConvertError(f"{path} does not exist or is no folder")
    if holds_dist_checkpoint(path):
        home = path.parent if path.name == ENGINE_STATE else path
        return _role_folder(path, home)
    home = path if holds_dist_checkpoint(path / ENGINE_STATE) else path / (role or "actor")
    if not holds_dist_checkpoint(home / ENGINE_STATE):
        raise ConvertError(
            f"{path} is neither a Hugging Face folder nor a checkpoint: there is no {ENGINE_STATE} in it or in its "
            f"{role or 'actor'} folder; give a folder such as RUN/checkpoints/global_step_5"
        )
    return _role_folder(home / ENGINE_STATE, home)


def find_manifest(path: Path) -> Manifest | None:
    """The manifest in the folder or, for a role's folder, in the one above."""
    for folder in (path, path.parent):
        if (folder / MANIFEST).is_file():
            return read_manifest(folder)
    return None


def _role_folder(dist: Path, home: Path) -> RoleFolder:
    manifest = find_manifest(home)
    roles = manifest.roles if manifest else {}
    role = MODEL if MODEL in roles else home.name
    carried = home / HUGGING_FACE
    return RoleFolder(
        dist=dist,
        role=role,
        record=roles.get(role),
        model_files=carried if (carried / "config.json").is_file() else None,
    )
