"""Verifiers of the reasoning-gym package's procedural tasks. Runs inside reward workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

PREFIX = "reasoning_gym/"
"""A row's data_source is this and the task's name."""
ENTRY_KEY = "entry"
"""Key in extra_info of the task's whole entry, encoded by `encode_entry`."""

_TUPLE, _PAIRS = "__tuple__", "__pairs__"


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float:
    """The package's own score of what stands between the last <answer> and </answer>; 0 without such tags.

    Raises:
        ValueError: the task is unknown to the installed package, or extra_info lacks the task's entry.
    """
    encoded = (extra_info or {}).get(ENTRY_KEY)
    if not isinstance(encoded, str):
        raise ValueError(f"extra_info[{ENTRY_KEY!r}] is missing; write the file with examples/data_preprocess")
    answers = re.findall(r"<answer>(.*?)</answer>", solution_str, flags=re.DOTALL)
    if not answers:
        return 0.0
    return float(_load_verifier(data_source.removeprefix(PREFIX))(answers[-1].strip(), decode_entry(encoded)))


@cache
def _load_verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym  # several seconds, paid only by workers that meet such a task

    return reasoning_gym.get_score_answer_fn(task)


def encode_entry(entry: Mapping[str, Any]) -> str:
    """JSON that `decode_entry` turns back into an equal entry: tuples stay tuples, and keys keep their type.

    Raises:
        ValueError: the entry holds something other than numbers, text, lists, tuples and mappings.
    """
    return json.dumps(_to_json(entry))


def decode_entry(text: str) -> dict[str, Any]:
    """The entry that `encode_entry` was given."""
    return _from_json(json.loads(text))


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(item) for item in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(item) for key, item in value.items()}
        return {_PAIRS: [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    raise ValueError(f"cannot store a {type(value).__module__}.{type(value).__name__} in a parquet row: {value!r:.100}")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if _TUPLE in value:
            return tuple(_from_json(item) for item in value[_TUPLE])
        if _PAIRS in value:
            return {_from_json(key): _from_json(item) for key, item in value[_PAIRS]}
        return {key: _from_json(item) for key, item in value.items()}
    return value
