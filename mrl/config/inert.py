"""Settings that would do nothing in the chosen configuration, so that none is ignored in silence."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mrl.config.inert_rules import CPU_RULES, RAY_RULES, RULES, Rule
from mrl.config.keys import default_values, flatten
from mrl.config.schema import PPOConfig


def find_inert_settings(config: PPOConfig, *, set_keys: Collection[str] = ()) -> list[str]:
    """One line for each group of settings that has no effect, saying why and what to set instead.

    Settings that only a CPU ignores are included if `trainer.device` is cpu.

    Args:
        set_keys: leaf keys named in overrides, reported even if they repeat the default.
    """
    lines = _apply(RULES, config, set_keys)
    return lines + find_inert_on_cpu(config, set_keys=set_keys) if config.trainer.device == "cpu" else lines


def find_inert_on_cpu(config: PPOConfig, *, set_keys: Collection[str] = ()) -> list[str]:
    """The lines about settings that act on GPUs only, for whoever finds that `trainer.device=auto` means a CPU."""
    return _apply(CPU_RULES, config, set_keys)


def find_inert_without_ray(config: PPOConfig) -> list[str]:
    """The lines about settings of Ray, for whoever finds that `trainer.launcher=auto` means another launcher."""
    return _apply(RAY_RULES, config, ())


def _apply(rules: Iterable[Rule], config: PPOConfig, set_keys: Collection[str]) -> list[str]:
    values, defaults = flatten(config), default_values()
    changed = {key for key, value in values.items() if value != defaults[key]}
    lines = []
    for rule in rules:
        if not rule.when(config):
            continue
        candidates = set(set_keys) if rule.overrides_only else changed | set(set_keys)
        found = [key for key in values if _matches(rule, key) and key in candidates]
        if found:
            listed = ", ".join(f"{key}={values[key]}" for key in found)
            lines.append(f"{listed} does not act: {rule.reason}")
    return lines


def _matches(rule: Rule, key: str) -> bool:
    return any(key.startswith(pattern) if pattern.endswith(".") else key == pattern for pattern in rule.keys)
