"""All key paths of the configuration, and the nearest of them to one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from mrl.config.schema import PPOConfig
from mrl.config.section import Section, field_types, is_free_form, is_section


def iterate_keys(section: type = PPOConfig, prefix: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """(key path, section that holds it, field name, type) of every leaf key, in order of declaration."""
    for name, hint in field_types(section).items():
        if is_section(hint):
            yield from iterate_keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section, name, hint


@cache
def leaf_keys() -> Mapping[str, Any]:
    """Type of every leaf key, by its path."""
    return {key: hint for key, _, _, hint in iterate_keys()}


def find_leaf(key: str) -> str | None:
    """The leaf key that `key` is or lies in (inside a free-form one), if any."""
    if key in leaf_keys():
        return key
    parts = key.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((parent for parent in parents if is_free_form(leaf_keys().get(parent))), None)


def is_section_path(key: str) -> bool:
    """Whether `key` names a section."""
    return any(leaf.startswith(key + ".") for leaf in leaf_keys())


def flatten(config: Section, prefix: str = "") -> dict[str, Any]:
    """Value of every leaf key, by its path; a free-form key is one value."""
    values: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Section):
            values |= flatten(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


@cache
def default_values() -> Mapping[str, Any]:
    """The schema's default of every leaf key, by its path."""
    return flatten(PPOConfig())


def suggest_keys(unknown: str, limit: int = 3) -> list[str]:
    """The known key paths nearest to `unknown`: like it as a whole, or with the same or a similar last part."""
    known = [*leaf_keys(), *sorted({leaf.rsplit(".", 1)[0] for leaf in leaf_keys()})]
    last = unknown.rsplit(".", 1)[-1]
    same_last = [key for key in known if key.rsplit(".", 1)[-1] == last]
    same_last.sort(key=lambda key: -difflib.SequenceMatcher(None, key, unknown).ratio())
    siblings = [key for key in known if key.rpartition(".")[0] == unknown.rpartition(".")[0]]
    by_last = {key.rsplit(".", 1)[-1]: key for key in siblings}
    similar_last = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=limit, cutoff=0.6)]
    similar_last += [key for name, key in by_last.items() if name.startswith(last)]
    similar = difflib.get_close_matches(unknown, known, n=limit, cutoff=0.75)
    return list(dict.fromkeys([*similar_last, *same_last, *similar]))[:limit]
