"""What reward workers are asked and what they answer.

Answers are JSON: a worker runs code that nobody has vetted, and unpickling what it sends would run its code here, too.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Item(NamedTuple):
    """What the function is called with, by position."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: dict[str, Any]


class Outcome(NamedTuple):
    """One item's score with its named parts, or why there is none."""

    score: float
    parts: dict[str, float]
    error: str | None = None


class Ready(NamedTuple):
    """A worker's first message: whether its function is a coroutine function, or why it could not be loaded."""

    is_async: bool
    error: str | None = None


class Preparing(NamedTuple):
    """Sent before an item's library is imported, so that this does not count against the item, and again after."""


Answer = Ready | Preparing | list[Outcome]


def encode_answer(answer: Answer) -> bytes:
    """A worker's message as JSON."""
    if isinstance(answer, list):
        return json.dumps({"outcomes": answer}).encode()
    return json.dumps({type(answer).__name__.lower(): answer}).encode()


def decode_answer(content: bytes) -> Answer:
    """What `encode_answer` encoded.

    Raises:
        ValueError: it did not.
    """
    try:
        [(kind, value)] = json.loads(content).items()
        match kind:
            case "outcomes":
                return [_outcome(*fields) for fields in value]
            case "ready":
                is_async, error = value
                return Ready(bool(is_async), _text(error))
            case "preparing":
                return Preparing()
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"a reward worker's answer is not one: {error}") from error
    raise ValueError(f"a reward worker's answer is of an unknown kind {kind!r:.40}")


def _outcome(score: Any, parts: Any, error: Any) -> Outcome:
    return Outcome(float(score), {str(name): float(value) for name, value in parts.items()}, _text(error))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
