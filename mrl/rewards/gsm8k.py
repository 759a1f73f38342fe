"""Verifier of grade-school math answers. Runs inside reward workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from mrl.rewards import math_answers

DATA_SOURCE = "openai/gsm8k"
MARKER = "####"
"""Stands before the final answer, in the data set's solutions and in the responses it asks for."""

_METHODS = ("strict", "flexible")
_DECORATION = str.maketrans("", "", ",$% ")


def extract_marked_answer(text: str) -> str | None:
    """What follows the last "####" up to the end of its line, without spaces around it; None if there is nothing."""
    matches = re.findall(rf"{MARKER}[ \t]*(\S[^\n]*)", text)
    return matches[-1].strip() if matches else None


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    gsm8k_method: str = "strict",
) -> float:
    """1.0 for the right final number, else 0.0.

    "strict" wants it after the last "####"; thousands separators, "$", "%" and a final full stop do not matter.
    "flexible" takes whatever math-verify finds to be the final answer anywhere in the response (boxed, LaTeX, a
    fraction, the last number).

    Raises:
        ValueError: the ground truth is no number, or the method is unknown.
    """
    expected = _parse_number(str(ground_truth))
    if expected is None:
        raise ValueError(f"ground_truth {ground_truth!r} of {data_source} is not a number")
    check_arguments({"gsm8k_method": gsm8k_method})
    if gsm8k_method == "flexible":
        return float(math_answers.is_equal(solution_str, f"{expected:f}"))
    answer = extract_marked_answer(solution_str)
    return float(answer is not None and _parse_number(answer) == expected)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the method is unknown."""
    method = arguments.get("gsm8k_method", "strict")
    if method not in _METHODS:
        raise ValueError(f"gsm8k_method = {method!r} must be {' or '.join(map(repr, _METHODS))}")


def library(arguments: Mapping[str, Any]) -> str | None:
    """The library that scoring with these arguments imports."""
    return math_answers.LIBRARY if arguments.get("gsm8k_method") == "flexible" else None


def _parse_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.translate(_DECORATION).rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
