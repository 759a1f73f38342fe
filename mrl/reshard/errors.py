"""Failures of a reshard while it runs; what can be refused beforehand is a ValueError."""

from __future__ import annotations


class ReshardError(RuntimeError):
    """A trainer buffer cannot be opened, or what arrived is not what was sent; the engine's weights are not usable."""
