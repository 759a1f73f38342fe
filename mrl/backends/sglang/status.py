"""What the weight loader did in this scheduler process, handed to the hook that reports it.

SGLang ignores a custom weight loader's return value, so it travels through this module.
"""

from __future__ import annotations

from typing import Any

_status: dict[str, Any] = {}


def put(**values: Any) -> None:
    """Add JSON-serialisable values to this process's status."""
    _status.update(values)


def take() -> dict[str, Any]:
    """The status so far; it is empty afterwards."""
    taken = dict(_status)
    _status.clear()
    return taken
