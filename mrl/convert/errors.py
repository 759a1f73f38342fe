"""Failures of the conversion tools."""

from __future__ import annotations


class ConvertError(ValueError):
    """A request that cannot be done: says what is wrong, with the path or tensor, and the remedy."""


class DamageError(ConvertError):
    """A file that cannot be read as what it is, or tensors that do not fit what describes them."""
