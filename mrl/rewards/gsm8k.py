"""Verifier of grade-school math answers. Runs inside reward workers."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

DATA_SOURCE = "openai/gsm8k"
MARKER = "####"
"""Stands before the final answer, in the data set's solutions and in the responses it asks for."""

_TIME_LIMIT_S = 10
"""Past this, math-verify takes a response for unparsable: a model's odd output must not end the run."""
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
    if gsm8k_method == "strict":
        answer = extract_marked_answer(solution_str)
        return float(answer is not None and _parse_number(answer) == expected)
    if gsm8k_method == "flexible":
        return float(_verify_anywhere(solution_str, expected))
    raise ValueError(f"gsm8k_method = {gsm8k_method!r} must be 'strict' or 'flexible'")


def _parse_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.translate(_DECORATION).rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _verify_anywhere(solution: str, expected: Decimal) -> bool:
    import math_verify  # three seconds of sympy, which the strict method does without

    answer = math_verify.parse(solution, parsing_timeout=_TIME_LIMIT_S)
    gold = math_verify.parse(f"${expected:f}$", parsing_timeout=_TIME_LIMIT_S)
    return math_verify.verify(gold, answer, timeout_seconds=_TIME_LIMIT_S)
