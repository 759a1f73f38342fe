"""Loading and saving: Hydra composes, the schema checks, the result is frozen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mrl.config.assignment import Assignment
from mrl.config.build import config_from_dict, config_to_dict, require_known
from mrl.config.compat import translate
from mrl.config.errors import ConfigError
from mrl.config.inert import find_inert_settings
from mrl.config.keys import find_leaf, is_section_path
from mrl.config.schema import PPOConfig

logger = logging.getLogger(__name__)


def load_config(overrides: Sequence[str] = (), config_name: str = "ppo_megatron_trainer") -> PPOConfig:
    """The checked, resolved and frozen configuration of `key=value` overrides on a file of `configs/`.

    verl's older spellings are mapped with a logged line, and settings that have no effect are logged as warnings.
    `+key=value` and `++key=value` mean `key=value`: keys inside free-form sections may be new, all others must exist.

    Raises:
        ConfigError: malformed overrides, unknown keys, wrong types, contradictions.
    """
    config_name = config_name.removesuffix(".yaml")
    assignments, choices = _parse(overrides)
    assignments, notes = translate(assignments)
    require_known([item.key for item in assignments if not is_section_path(item.key)])
    config = config_from_dict(compose_values(config_name, assignments, choices))
    for note in notes:
        logger.info(note)
    set_keys = {leaf for item in assignments if (leaf := find_leaf(item.key)) is not None}
    for line in find_inert_settings(config, set_keys=set_keys):
        logger.warning(line)
    return config


def compose_values(
    config_name: str, assignments: Sequence[Assignment] = (), choices: Sequence[str] = ()
) -> dict[str, Any]:
    """The resolved but unchecked values of a file of `configs/` with assignments and choices of group files.

    Raises:
        ConfigError: no such file, or Hydra cannot compose it.
    """
    try:
        values = copy.deepcopy(_compose_files(config_name, tuple(choices)))
        for item in assignments:
            value = _parse_one(f"{item.key}={item.value}").value()
            OmegaConf.update(values, item.key, value, merge=True, force_add=True)
        plain = OmegaConf.to_container(values, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose the configuration: {error}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@cache
def _compose_files(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    directory = config_dir()
    if not (directory / f"{config_name}.yaml").is_file():
        names = ", ".join(sorted(path.stem for path in directory.glob("*.yaml")))
        raise ConfigError(f"no configuration named {config_name!r} in {directory}; there are {names}")
    with initialize_config_dir(version_base="1.3", config_dir=str(directory)):
        values = compose(config_name, list(choices))
    OmegaConf.set_struct(values, False)
    return values


def save_config(config: PPOConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(spell_config(config), encoding="utf-8")


def spell_config(config: PPOConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def read_config(path: str | Path) -> PPOConfig:
    """The configuration that `save_config` wrote.

    Raises:
        ConfigError: the file is missing or not what `save_config` writes.
    """
    try:
        return parse_config(Path(path).read_text(encoding="utf-8"), source=f"configuration {path}")
    except (OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error


def parse_config(text: str, *, source: str = "the configuration") -> PPOConfig:
    """The configuration that `spell_config` spelled.

    Args:
        source: what to call it in messages.

    Raises:
        ConfigError: it is not a mapping of sections, or not a configuration.
    """
    values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"{source} is not a mapping of sections")
    return config_from_dict({str(key): value for key, value in values.items()})


def config_dir() -> Path:
    """The folder of YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "ppo_megatron_trainer.yaml").is_file():
            return candidate
    raise ConfigError(f"configs/ppo_megatron_trainer.yaml is neither in {package} nor beside it; reinstall mrl")


def _parse(overrides: Sequence[str]) -> tuple[list[Assignment], list[str]]:
    """Assignments of values, and choices of files for whole groups."""
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    assignments: list[Assignment] = []
    choices: list[str] = []
    for text in overrides:
        override = _parse_one(text)
        if override.key_or_group in groups or override.package is not None:
            choices.append(text)
        else:
            assignments.append(Assignment(key=override.key_or_group, value=_value_text(text)))
    return assignments, choices


def _parse_one(text: str) -> Override:
    key, _, value = text.partition("=")
    if value.startswith("~"):
        text = f"{key}={_value_text(text)}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"cannot read override {text!r}: it must be key=value, and a value with spaces or signs such as = needs "
            f"quotes, key='\"a b\"' ({str(error).splitlines()[0]})"
        ) from None
    if override.is_delete():
        raise ConfigError(f"override {text!r}: keys cannot be deleted; set one to null instead")
    if override.is_sweep_override():
        raise ConfigError(f"override {text!r}: sweeps are not supported; a list is written key=[a,b]")
    return override


def _value_text(text: str) -> str:
    value = text.partition("=")[2]
    return f"'{value}'" if value.startswith("~") else value
