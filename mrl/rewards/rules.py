"""The built-in verifiers and the data sources they belong to. Light to import: it runs inside reward workers."""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mrl.rewards import embedded, exact_match, gsm8k, json_schema, math_answers, reasoning_gym


class Verifier(NamedTuple):
    """One built-in verifier."""

    compute_score: Callable[..., Any]
    check_arguments: Callable[[Mapping[str, Any]], None] | None = None
    """Raises ValueError for arguments of its own that make no sense."""
    library: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None
    """What it imports on first use, in seconds."""


class Choice(NamedTuple):
    """A verifier's name and the arguments it is called with."""

    name: str
    arguments: Mapping[str, Any] = {}


VERIFIERS: dict[str, Verifier] = {
    "embedded": Verifier(embedded.compute_score),
    "exact_match": Verifier(exact_match.compute_score, exact_match.check_arguments),
    "gsm8k": Verifier(gsm8k.compute_score, gsm8k.check_arguments, gsm8k.library),
    "json_schema": Verifier(json_schema.compute_score, json_schema.check_arguments),
    "math_verify": Verifier(math_answers.compute_score, None, lambda arguments: math_answers.LIBRARY),
    "reasoning_gym": Verifier(reasoning_gym.compute_score, None, lambda arguments: "reasoning_gym"),
}

_MATH = Choice("math_verify")
_MATH_OR_MINUS_ONE = Choice("math_verify", {"wrong_score": -1.0})
"""What DAPO's recipes expect of these sources."""

ROUTES: dict[str, Choice] = {
    embedded.DATA_SOURCE: Choice("embedded"),
    gsm8k.DATA_SOURCE: Choice("gsm8k"),
    f"{reasoning_gym.PREFIX}?*": Choice("reasoning_gym"),
    "lighteval/MATH": _MATH,
    "DigitalLearningGmbH/MATH-lighteval": _MATH,
    "HuggingFaceH4/MATH-500": _MATH,
    "numina_*": _MATH,
    "math": _MATH_OR_MINUS_ONE,
    "math_dapo": _MATH_OR_MINUS_ONE,
    "math_dapo_reasoning": _MATH_OR_MINUS_ONE,
    "aime*": _MATH_OR_MINUS_ONE,
}
"""Data sources, as verl names them, and shell patterns of them."""


def check_verifiers(configured: Mapping[str, Any]) -> None:
    """Raise ValueError, telling the data source, if a configured verifier is unknown or does not take its arguments.

    Args:
        configured: by data source or shell pattern, a verifier's name, or a mapping of its `name` and its arguments.
    """
    for source, value in configured.items():
        try:
            check_choice(_read_choice(value))
        except ValueError as error:
            raise ValueError(f"verifier of data_source {source!r}: {error}") from error


def check_choice(choice: Choice) -> None:
    """Raise ValueError if there is no such verifier, or it does not take these arguments."""
    verifier = VERIFIERS.get(choice.name)
    if verifier is None:
        raise ValueError(f"there is no verifier {choice.name!r}; there are {', '.join(VERIFIERS)}")
    parameters = inspect.signature(verifier.compute_score).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [name for name in choice.arguments if name not in known]
    if unknown:
        takes = f"takes {', '.join(known)}" if known else "takes no argument"
        raise ValueError(f"the verifier {choice.name} {takes}, not {', '.join(unknown)}")
    if verifier.check_arguments is not None:
        verifier.check_arguments(choice.arguments)


def check_data_sources(names: Collection[str], verifiers: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError if a data_source has no verifier, neither a configured nor a built-in one."""
    unknown = sorted({name for name in names if _route(name, verifiers or {}) is None})
    if unknown:
        raise ValueError(
            f"no verifier for data_source {', '.join(map(repr, unknown))}; known: {', '.join(ROUTES)}. Name one in "
            f"reward.verifiers (there are {', '.join(VERIFIERS)}), or give a reward function of your own"
        )


def choose(
    data_source: str, *, verifier: str | None = None, verifiers: Mapping[str, Any] | None = None, **arguments: Any
) -> Choice:
    """The verifier that scores samples of this data source.

    Args:
        verifier: for all data sources.
        verifiers: by data source, as `check_verifiers` takes them; they win over the built-in routes.
        arguments: added to the chosen verifier's own.

    Raises:
        ValueError: the data source is unknown.
    """
    if verifier is not None:
        return Choice(verifier, arguments)
    check_data_sources([data_source], verifiers)
    choice = _route(data_source, verifiers or {})
    assert choice is not None
    return Choice(choice.name, {**choice.arguments, **arguments})


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **options: Any
) -> Any:
    """What the verifier of this data source returns; the options are those of `choose`."""
    choice = choose(data_source, **options)
    return VERIFIERS[choice.name].compute_score(data_source, solution_str, ground_truth, extra_info, **choice.arguments)


def missing_library(data_source: str, options: Mapping[str, Any]) -> str | None:
    """The library that the verifier of `data_source` needs and this process has yet to import, in seconds."""
    choice = choose(data_source, **options)
    library = VERIFIERS[choice.name].library(choice.arguments)
    return None if library in sys.modules else library


def _route(data_source: str, configured: Mapping[str, Any]) -> Choice | None:
    value = _find(data_source, configured)
    return _find(data_source, ROUTES) if value is None else _read_choice(value)


def _find[ValueT](data_source: str, by_source: Mapping[str, ValueT]) -> ValueT | None:
    """The value of that name or else of the first shell pattern that matches it."""
    if data_source in by_source:
        return by_source[data_source]
    return next((value for pattern, value in by_source.items() if fnmatch.fnmatchcase(data_source, pattern)), None)


def _read_choice(value: Any) -> Choice:
    if isinstance(value, str):
        return Choice(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"{value!r} must be a verifier's name, or a mapping with its `name` and its arguments")
    return Choice(value["name"], {key: argument for key, argument in value.items() if key != "name"})
