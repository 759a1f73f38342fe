"""`mrl demo`: PPO on the embedded task with the real engines, on whatever machine this is."""

from __future__ import annotations

from collections.abc import Sequence

from mrl.trainer import main_ppo


def main(argv: Sequence[str]) -> int:
    """Train with configs/demo.yaml; `argv` holds further key=value overrides."""
    return main_ppo.main(["--config-name", "demo", *argv])
