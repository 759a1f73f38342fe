"""Verifier of answers that have one right spelling. Runs inside reward workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    pattern: str | None = None,
    ignore_case: bool = False,
) -> float:
    """1.0 if the answer is the ground truth, or one of them if it is a list, else 0.0.

    Whitespace around either and the length of whitespace inside do not matter.

    Args:
        pattern: regular expression whose first group, in its last match, is the answer; None takes the whole response.
        ignore_case: upper and lower case are the same.

    Raises:
        ValueError: there is no ground truth.
    """
    accepted = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not accepted or any(answer is None for answer in accepted):
        raise ValueError(f"ground_truth {ground_truth!r} of {data_source} is nothing to compare with")
    answer: str | None = solution_str
    if pattern is not None:
        matches = list(re.finditer(pattern, solution_str, flags=re.DOTALL))
        answer = matches[-1][1] if matches else None
    if answer is None:
        return 0.0
    return float(_normalise(answer, ignore_case) in {_normalise(str(each), ignore_case) for each in accepted})


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if `pattern` is no regular expression with a group."""
    pattern = arguments.get("pattern")
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern = {pattern!r} is not a regular expression: {error}") from error
    if groups < 1:
        raise ValueError(f"pattern = {pattern!r} has no group (...) around the answer")


def _normalise(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
