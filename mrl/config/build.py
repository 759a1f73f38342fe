"""From a plain mapping to a checked `PPOConfig`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrl.config.compat import explain_unknown
from mrl.config.errors import ConfigError
from mrl.config.frozen import thaw
from mrl.config.keys import find_leaf
from mrl.config.schema import PPOConfig
from mrl.config.section import Section, field_types, is_section


def config_from_dict(values: Mapping[str, Any]) -> PPOConfig:
    """The configuration of a nested mapping; absent keys take their defaults.

    Raises:
        ConfigError: unknown keys (all of them are named), a value of the wrong type, a contradiction.
    """
    require_known(_leaves(values, PPOConfig, ""))
    return _build(PPOConfig, values, "")


def config_to_dict(config: Section) -> dict[str, Any]:
    """The configuration as nested plain dicts and lists."""
    plain: dict[str, Any] = {}
    for name in field_types(type(config)):
        value = getattr(config, name)
        plain[name] = config_to_dict(value) if isinstance(value, Section) else thaw(value)
    return plain


def require_known(keys: list[str]) -> None:
    """Raise ConfigError if a key path does not exist, naming the nearest that do."""
    unknown = [key for key in keys if find_leaf(key) is None]
    if unknown:
        raise ConfigError("\n".join(explain_unknown(key) for key in unknown))


def _leaves(values: Mapping[str, Any], section: type, prefix: str) -> list[str]:
    keys: list[str] = []
    hints = field_types(section)
    for name, value in values.items():
        if is_section(hints.get(name)) and isinstance(value, Mapping):
            keys += _leaves(value, hints[name], f"{prefix}{name}.")
        elif not is_section(hints.get(name)):
            keys.append(f"{prefix}{name}")
    return keys


def _build[SectionT: Section](section: type[SectionT], values: Mapping[str, Any], path: str) -> SectionT:
    arguments: dict[str, Any] = {}
    for name, hint in field_types(section).items():
        if name not in values:
            continue
        value, key = values[name], f"{path}.{name}" if path else name
        if is_section(hint) and not isinstance(value, Mapping):
            raise ConfigError(f"{key} = {value!r} is a section; set the keys inside it")
        arguments[name] = _build(hint, value, key) if is_section(hint) else value
    try:
        return section(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None
