"""The built-in verifiers, chosen by a row's data_source. Light to import: it runs inside reward workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mrl.rewards import embedded, gsm8k, reasoning_gym

_VERIFIERS: dict[str, Callable[..., float]] = {
    embedded.DATA_SOURCE: embedded.compute_score,
    gsm8k.DATA_SOURCE: gsm8k.compute_score,
}


def check_data_sources(names: Collection[str]) -> None:
    """Raise ValueError if a data_source has no built-in verifier."""
    unknown = sorted({name for name in names if not _is_known(name)})
    if unknown:
        raise ValueError(
            f"no built-in verifier for data_source {', '.join(map(repr, unknown))}; known: {', '.join(_VERIFIERS)}, "
            f"{reasoning_gym.PREFIX}<task>. Give a reward function of your own by file and name"
        )


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """The score of the verifier that belongs to `data_source`; keyword arguments go to it.

    Raises:
        ValueError: the data source is unknown.
    """
    check_data_sources([data_source])
    verifier = _VERIFIERS.get(data_source, reasoning_gym.compute_score)
    return verifier(data_source, solution_str, ground_truth, extra_info, **kwargs)


def missing_library(data_source: str, kwargs: Mapping[str, Any]) -> str | None:
    """The library that the verifier of `data_source` needs and this process has yet to import, in seconds."""
    library = None
    if data_source.startswith(reasoning_gym.PREFIX):
        library = "reasoning_gym"
    elif data_source == gsm8k.DATA_SOURCE and kwargs.get("gsm8k_method") == "flexible":
        library = "math_verify"
    return None if library in sys.modules else library


def _is_known(name: str) -> bool:
    return name in _VERIFIERS or (name.startswith(reasoning_gym.PREFIX) and name != reasoning_gym.PREFIX)
