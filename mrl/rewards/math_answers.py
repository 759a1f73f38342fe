"""Verifier of mathematical answers by meaning: 1/2, 0.5 and one half are the same. Runs inside reward workers."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

LIBRARY = "math_verify"
_BOXED = "\\boxed{"
_ANNOUNCED = re.compile(r"answer\s*:\s*([^\n]+)", flags=re.IGNORECASE)
_TIME_LIMIT_S = 10
"""Past this, math-verify takes a text for unparsable: a model's odd output must not end the run."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    wrong_score: float = 0.0,
) -> dict[str, float]:
    """`score` 1 for a response whose final answer equals the ground truth, else `wrong_score`; `acc` is 1 or 0.

    The final answer is what math-verify finds: the last \\boxed{...}, else what is announced as the answer, else the
    last formula or number.

    Raises:
        ValueError: the ground truth is no formula.
    """
    accepted = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    correct = any(is_equal(solution_str, str(answer)) for answer in accepted)
    return {"score": 1.0 if correct else float(wrong_score), "acc": float(correct)}


def is_equal(response: str, expected: str) -> bool:
    """Whether the response's final answer is, by math-verify, the formula `expected`.

    Raises:
        ValueError: `expected` is no formula.
    """
    import math_verify  # three seconds of sympy, which light verifiers do without

    gold = list(_parse_expected(expected))
    answer = math_verify.parse(_final_part(response), parsing_timeout=_TIME_LIMIT_S)
    return bool(math_verify.verify(gold, answer, timeout_seconds=_TIME_LIMIT_S))


def _final_part(response: str) -> str:
    """Of several boxed answers math-verify would make one set."""
    start = response.rfind(_BOXED)
    if start >= 0:
        depth = 0
        for end, character in enumerate(response[start:], start):
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return response[start : end + 1]
        return ""
    announced = _ANNOUNCED.findall(response)
    return announced[-1].strip() if announced else response


@cache
def _parse_expected(expected: str) -> tuple[Any, ...]:
    import math_verify  # as above

    is_marked = _BOXED in expected or "$" in expected
    gold = math_verify.parse(expected if is_marked else f"\\boxed{{{expected}}}", parsing_timeout=_TIME_LIMIT_S)
    if not gold:
        raise ValueError(f"ground_truth {expected!r} is not a formula that math-verify can read")
    return tuple(gold)
