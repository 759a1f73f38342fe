"""Range checks shared by the sections."""

from __future__ import annotations

import math
from collections.abc import Collection

from mrl.config.errors import ConfigError
from mrl.config.section import Section


def at_least(section: Section, minimum: float, *names: str) -> None:
    """Raise ConfigError if a named field is below `minimum`; null passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{name} = {value} must be at least {minimum}")


def more_than(section: Section, bound: float, *names: str) -> None:
    """Raise ConfigError if a named field is not above `bound`; null passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > bound:
            raise ConfigError(f"{name} = {value} must be greater than {bound}")


def within(section: Section, low: float, high: float, *names: str) -> None:
    """Raise ConfigError if a named field lies outside [low, high]; null passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name} = {value} must lie in [{low}, {high}]")


def finite(section: Section, *names: str) -> None:
    """Raise ConfigError if a named field is infinite or not a number; null passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name} = {value} must be a finite number")


def positive_or_unset(section: Section, *names: str) -> None:
    """Raise ConfigError unless a named field is at least 1, or -1 for "not set"."""
    for name in names:
        value = getattr(section, name)
        if value < 1 and value != -1:
            raise ConfigError(f"{name} = {value} must be at least 1, or -1 to leave it open")


def check_names(section: Section, name: str, known: Collection[str]) -> None:
    """Raise ConfigError if a free-form field holds other names than the known ones."""
    unknown = sorted(set(getattr(section, name)).difference(known))
    if unknown:
        listed = ", ".join(f"{name}.{each}" for each in unknown)
        raise ConfigError(f"{listed}: not supported, known are {', '.join(known)}; drop it")


def not_both(section: Section, per_gpu: str, deprecated: str) -> None:
    """Raise ConfigError if a per-GPU micro-batch key and its deprecated global twin are both set."""
    new, old = getattr(section, per_gpu), getattr(section, deprecated)
    if new is not None and old is not None:
        raise ConfigError(
            f"{per_gpu} = {new} and {deprecated} = {old} are both set and mean the same number; "
            f"drop {deprecated}, which is deprecated"
        )
