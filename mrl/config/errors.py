"""The one exception of configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """A key or value of the configuration that the user has to change; the message says which and to what."""
