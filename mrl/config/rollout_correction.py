"""Settings of rollout correction: section `algorithm.rollout_correction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mrl.config.errors import ConfigError
from mrl.config.section import Section

_SCOPES = {"token": ("k1", "k2", "k3"), "seq_sum": ("k1", "k2", "k3"), "seq_mean": ("k1", "k2", "k3"),
           "seq_max": ("k2", "k3")}  # fmt: skip
REJECTIONS: tuple[str, ...] = tuple(
    f"{scope}_{divergence}" for scope, divergences in _SCOPES.items() for divergence in divergences
)
"""Names that `rollout_rs` takes."""


class Bounds(NamedTuple):
    """A range; without a lower bound, everything up to the upper one."""

    lower: float | None
    upper: float


@dataclass(kw_only=True, frozen=True)
class RolloutCorrectionConfig(Section):
    """Correction for samples from another distribution than the trainer's; docs/algorithms.md has the formulas."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Importance weights trainer / rollout of the policy loss: one per token, one per sequence, or none (null)."""
    rollout_is_threshold: float | str = 2.0
    """Upper bound that weights are truncated to, or `'lower_upper'`: weights outside are 0 (IcePop). Also what
    `parity/outside_fraction` counts by."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the step's batch."""
    rollout_rs: str | tuple[str, ...] | None = None
    """Tests that a token or sequence has to pass to be trained, such as seq_mean_k1: one, or a list."""
    rollout_rs_threshold: float | str | tuple[float | str, ...] | None = None
    """Bound of each test, or one for all: `'lower_upper'` of the ratio rollout / trainer for k1 (one number x means
    1/x to x), the largest divergence for k2 and k3."""
    bypass_mode: bool = False
    """Take the engine's log-probs for the old ones and leave out the forward pass that would compute them."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """With bypass_mode: PPO's clipped loss, whose ratio corrects by itself, or the policy gradient with weights."""

    def check(self) -> None:
        _ = self.weight_bounds, self.rejections
        if self.bypass_mode and self.rollout_is_batch_normalize:
            raise ConfigError(
                "rollout_is_batch_normalize = True, but bypass_mode = True weighs with log-probs that every update "
                "changes, whose mean over the batch is not known; set one of them to False"
            )

    @property
    def weight_bounds(self) -> Bounds:
        """Those of `rollout_is_threshold`."""
        bounds = _parse_bounds("rollout_is_threshold", self.rollout_is_threshold)
        _require_one_inside("rollout_is_threshold", self.rollout_is_threshold, bounds)
        return bounds

    @property
    def rejections(self) -> tuple[tuple[str, Bounds], ...]:
        """Names of `rollout_rs`, each once, and their bounds."""
        names = list(dict.fromkeys(str(item) for item in _items(self.rollout_rs)))
        thresholds = _items(self.rollout_rs_threshold)
        unknown = [name for name in names if name not in REJECTIONS]
        if unknown:
            raise ConfigError(f"rollout_rs = {unknown[0]!r} is unknown; choose from {', '.join(REJECTIONS)}")
        if not names:
            return ()
        if len(thresholds) not in (1, len(names)):
            raise ConfigError(
                f"rollout_rs_threshold has {len(thresholds)} bound(s), but rollout_rs has {len(names)} test(s): "
                f"{', '.join(names)}; give each its own, or one for all"
            )
        pairs = zip(names, thresholds * (len(names) if len(thresholds) == 1 else 1), strict=True)
        return tuple((name, _rejection_bounds(name, threshold)) for name, threshold in pairs)


def _items(value: str | float | Sequence[str | float] | None) -> list[str | float]:
    """The entries of a list, of a text with commas, or of a single value."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else [item for part in value for item in _items(part)]


def _parse_bounds(key: str, value: float | str) -> Bounds:
    lower, separator, upper = str(value).rpartition("_")
    try:
        bounds = Bounds(float(lower) if separator else None, float(upper))
    except ValueError:
        raise ConfigError(f"{key} = {value!r} must be a number, or two as 'lower_upper'") from None
    if not all(0 < bound < float("inf") for bound in bounds if bound is not None):
        raise ConfigError(f"{key} = {value!r} must be positive and finite")
    return bounds


def _require_one_inside(key: str, value: float | str, bounds: Bounds) -> None:
    if bounds.upper < 1 or (bounds.lower or 0) > 1:
        raise ConfigError(
            f"{key} = {value!r} leaves out the ratio 1, at which trainer and engine agree; lower <= 1 <= upper is "
            "needed (a value such as 0.5_2 needs quotes, key='\"0.5_2\"', as YAML reads it as the number 0.52)"
        )


def _rejection_bounds(name: str, threshold: str | float) -> Bounds:
    key = f"rollout_rs_threshold of {name}"
    bounds = _parse_bounds(key, threshold)
    if name.endswith("k1"):
        bounds = Bounds(bounds.lower or 1 / bounds.upper, bounds.upper)
        _require_one_inside(key, threshold, bounds)
    elif bounds.lower is not None:
        raise ConfigError(f"{key} = {threshold!r}: a divergence has an upper bound only; give one number")
    return bounds
