"""What every section of the configuration is: a frozen dataclass that checks the types of its own fields."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mrl.config.errors import ConfigError
from mrl.config.frozen import freeze


@dataclass(kw_only=True, frozen=True)
class Section:
    """Base of all sections. Values are converted where nothing is lost: int to float, list to tuple, one to a tuple.

    Messages begin with the field's name, so that whoever knows where the section sits can put its path in front.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, conform(getattr(self, name), hint, name))
        self.check()

    def check(self) -> None:
        """Raise ConfigError where values contradict each other or their meaning; each section has its own."""


def field_types(section: type) -> Mapping[str, Any]:
    """Resolved type of each field of a section, in the order of declaration."""
    if section not in _field_types:
        hints = get_type_hints(section)
        _field_types[section] = {field.name: hints[field.name] for field in fields(section)}
    return _field_types[section]


_field_types: dict[type, Mapping[str, Any]] = {}
"""Resolving a type compiles its text, too slow to repeat for every section that is built."""


def is_section(hint: Any) -> bool:
    """Whether a field's type is a nested section."""
    return isinstance(hint, type) and is_dataclass(hint)


def is_free_form(hint: Any) -> bool:
    """Whether a field takes arbitrary keys, handed on to a library."""
    return get_origin(hint) is Mapping


def conform(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`; raises ConfigError if it is of another."""
    for candidate in _members(hint):
        accepted, converted = _try(value, candidate, name)
        if accepted:
            return converted
    raise ConfigError(f"{name} = {value!r} must be {describe(hint)}")


def describe(hint: Any) -> str:
    """A type in words, for messages and the key table."""
    return " or ".join(_describe_one(member) for member in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _try(value: Any, hint: Any, name: str) -> tuple[bool, Any]:
    origin = get_origin(hint)
    if hint is Any:
        return True, freeze(value)
    if hint is types.NoneType:
        return value is None, None
    if origin is Literal:
        return value in get_args(hint), value
    if origin is tuple:
        return _try_tuple(value, get_args(hint), name)
    if origin is Mapping:
        return isinstance(value, Mapping), freeze(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if hint is int and isinstance(value, bool):
        return False, None
    return isinstance(value, hint), value


def _try_tuple(value: Any, items: tuple[Any, ...], name: str) -> tuple[bool, Any]:
    if isinstance(value, list):
        value = tuple(value)
    if len(items) == 2 and items[1] is Ellipsis:
        value = (value,) if isinstance(value, str) else value
        items = (items[0],) * len(value) if isinstance(value, tuple) else items
    if not isinstance(value, tuple) or len(value) != len(items):
        return False, None
    return True, tuple(
        conform(item, hint, f"{name}[{i}]") for i, (item, hint) in enumerate(zip(value, items, strict=True))
    )


def _describe_one(hint: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[1:] == (Ellipsis,):
            return f"a list, each item {describe(items[0])}"
        return "a list of " + ", ".join(describe(item) for item in items)
    return "a mapping" if get_origin(hint) is Mapping else getattr(hint, "__name__", str(hint))
