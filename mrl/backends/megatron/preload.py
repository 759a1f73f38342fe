"""Imports everything a Megatron rank needs, in the parent that ranks are forked from."""

from __future__ import annotations

import importlib


def preload_megatron() -> None:
    """Import the backend and megatron-core (3 s): a rank forked from this process then starts in milliseconds."""
    importlib.import_module("mrl.backends.megatron.setup")
