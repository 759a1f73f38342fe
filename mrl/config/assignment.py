"""What a command line sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mrl.config.errors import ConfigError


@dataclass(kw_only=True, frozen=True)
class Assignment:
    """One `key=value` of the command line; the value is still text."""

    key: str
    value: str

    @property
    def plain(self) -> str:
        """The value without quotes, in lower case."""
        return self.value.strip("'\"").lower()

    @property
    def truth(self) -> bool:
        """The value of a switch; ConfigError if it is neither True nor False."""
        if self.plain not in ("true", "false"):
            raise ConfigError(f"{self.key} = {self.value} must be True or False")
        return self.plain == "true"

    @property
    def is_zero(self) -> bool:
        """Whether the value is the number 0."""
        try:
            return float(self.plain) == 0
        except ValueError:
            return False


def find_nearest[Entry](table: Mapping[str, Entry], key: str) -> Entry | None:
    """What a table says of a key, or of the nearest section around it."""
    while key and key not in table:
        key = key.rpartition(".")[0]
    return table.get(key)
