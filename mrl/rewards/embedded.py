"""Verifier of the embedded counting task. Standard library only: it also runs inside reward workers."""

from __future__ import annotations

from typing import Any

DATA_SOURCE = "embedded/counting"

_RUN = "0123456789"


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """Share of the response that counts on, in [0, 1]; stopping early or late scores less.

    A character counts if it is the digit after the character before it (before the first stands the digit below the
    answer's first). The score is (characters that count, within the answer's length) / max(answer's length,
    response's length), so only the exact answer scores 1.
    """
    before = str(int(ground_truth[0]) - 1)
    correct = 0
    for given in solution_str[: len(ground_truth)]:
        correct += before + given in _RUN
        before = given
    return correct / max(len(ground_truth), len(solution_str))
