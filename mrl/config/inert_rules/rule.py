"""One group of settings that may have no effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mrl.config.schema import PPOConfig

ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))


@dataclass(kw_only=True, frozen=True)
class Rule:
    """Keys that are inert when `when` holds. They count as set when named in overrides or unlike their default."""

    keys: tuple[str, ...]
    """Key paths; one that ends in a dot is all keys below it."""
    when: Callable[[PPOConfig], bool]
    reason: str
    overrides_only: bool = False
    """Another key's value is their default, so being unlike the schema's default says nothing."""
