"""Verifier of responses that have to be JSON of a given form. Runs inside reward workers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", flags=re.DOTALL)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    schema: Mapping[str, Any] | None = None,
) -> float:
    """1.0 if the response is a JSON document that the schema accepts, else 0.0.

    The document is the whole response or, if there is one, the content of its last ``` block.

    Args:
        schema: JSON Schema; None takes the row's ground truth, a mapping or its JSON text.

    Raises:
        ValueError: the schema is no JSON Schema.
    """
    import jsonschema  # light verifiers share the worker

    expected = ground_truth if schema is None else schema
    validator = jsonschema.validators.validator_for(_as_schema(expected), default=jsonschema.Draft202012Validator)
    check_schema(expected)
    try:
        document = parse_json(solution_str)
    except ValueError:
        return 0.0
    return float(validator(_as_schema(expected)).is_valid(document))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if `schema` is given and is no JSON Schema."""
    if arguments.get("schema") is not None:
        check_schema(arguments["schema"])


def check_schema(schema: Any) -> None:
    """Raise ValueError if a mapping, or the JSON text of one, is no JSON Schema."""
    import jsonschema  # as above

    parsed = _as_schema(schema)
    try:
        jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator).check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.message} at {error.json_path}") from error


def parse_json(text: str) -> Any:
    """The JSON document in a response: its last ``` block, or all of it.

    Raises:
        ValueError: it is not JSON; NaN and Infinity are not, either.
    """
    blocks = _FENCED.findall(text)
    return json.loads(blocks[-1] if blocks else text, parse_constant=_refuse_constant)


def _as_schema(schema: Any) -> dict[str, Any]:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"the JSON Schema {schema!r:.200} is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ValueError(f"the JSON Schema must be a mapping or the JSON text of one, not {schema!r:.200}")
    return dict(schema)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
