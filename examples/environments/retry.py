"""An environment of two turns for the embedded counting task: a wrong answer gets the question again.

`respond` is `actor_rollout_ref.rollout.multi_turn.environment`, `compute_score` the run's reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mrl.rewards import embedded


def respond(messages: Sequence[dict[str, Any]], ground_truth: str, extra_info: dict[str, Any]) -> str | None:
    """The question again, or None where the last answer is right."""
    return None if messages[-1]["content"] == ground_truth else str(messages[0]["content"])


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], discount: float = 0.9
) -> dict[str, float]:
    """The last answer's score, less for every try before it, and whether the first was right."""
    answers = [turn["content"] for turn in extra_info["turns"] if turn["role"] == "assistant"]
    score = embedded.compute_score(data_source, answers[-1], ground_truth) * discount ** (len(answers) - 1)
    return {"score": score, "first_try": float(answers[0] == ground_truth)}
