"""What a command line sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class Assignment:
    """One `key=value` of the command line; the value is still text."""

    key: str
    value: str
