"""What reward workers are asked and what they answer.

Answers are JSON: a worker runs code that nobody has vetted, and unpickling what it sends would run its code here, too.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple


class Item(NamedTuple):
    """What the function is called with, by position."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: dict[str, Any]


class Conversation(NamedTuple):
    """What an environment's function is called with, by position."""

    messages: list[dict[str, Any]]
    ground_truth: Any
    extra_info: dict[str, Any]


class Outcome(NamedTuple):
    """One item's score with its named parts, or an environment's messages, or why there is neither."""

    score: float
    parts: dict[str, float]
    error: str | None = None
    messages: list[dict[str, Any]] | None = None
    """None ends the conversation."""


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
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"a reward worker's answer is not one: {error}") from error
    raise ValueError(f"a reward worker's answer is of an unknown kind {kind!r:.40}")


def _outcome(score: Any, parts: Any, error: Any, messages: Any) -> Outcome:
    numbers = {str(name): float(value) for name, value in parts.items()}
    if not all(map(math.isfinite, (float(score), *numbers.values()))):
        raise ValueError("a number is not finite")
    return Outcome(float(score), numbers, _text(error), None if messages is None else check_messages(messages))


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages themselves; ValueError unless each is text under "role", "content" and other names."""
    if not isinstance(messages, list):
        raise ValueError(f"{messages!r:.200} is no list of messages")
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise ValueError(f"{message!r:.200} is no message with a 'role' and a 'content'")
        if not all(isinstance(text, str) for text in message.values()):
            raise ValueError(f"{message!r:.200} has values other than text")
        if message["role"] == "assistant":
            raise ValueError(f"{message!r:.200} speaks for the model")
        # Text that was read with surrogateescape is none.
        "".join(message.values()).encode()
    return messages


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
