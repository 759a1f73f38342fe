"""Rows of parquet files in verl's format, checked before anything is tokenized."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PREPROCESSORS = "examples/data_preprocess shows how to write such files"


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """One row: the prompt as written, and what the reward needs."""

    uid: str
    """File as given, colon, row number in the file."""
    prompt: str | list[dict[str, Any]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


def read_rows(
    files: str | Sequence[str], *, prompt_key: str = "prompt", reward_fn_key: str = "data_source", max_samples: int = -1
) -> list[Row]:
    """The rows of one or several parquet files, in order; at most the first `max_samples` of them (-1: all).

    A row is {reward_fn_key: str, prompt_key: str or list of messages, reward_model: {ground_truth, ...}} and,
    optionally, extra_info: {...}.

    Raises:
        ValueError: a file is missing, empty, not parquet, or lacks a column; a row has no usable prompt.
    """
    if max_samples == 0 or max_samples < -1:
        raise ValueError(f"max_samples = {max_samples} must be positive, or -1 for all rows")
    names = [files] if isinstance(files, str) else list(files)
    if not names:
        raise ValueError("no data files were given; set data.train_files and data.val_files")
    rows: list[Row] = []
    for name in names:
        rows.extend(_read_file(name, prompt_key, reward_fn_key))
        if 0 < max_samples <= len(rows):
            return rows[:max_samples]
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as one parquet file, whole or not at all, making its folder.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError(f"no rows to write to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows)), scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _read_file(name: str, prompt_key: str, reward_fn_key: str) -> Iterator[Row]:
    table = _read_table(name)
    required = (prompt_key, reward_fn_key, "reward_model")
    missing = [column for column in required if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}; its columns are {table.column_names}. "
            f"Set data.prompt_key and data.reward_fn_key, or write the file in verl's row format; {_PREPROCESSORS}"
        )
    if table.num_rows == 0:
        raise ValueError(f"{name} has no rows (columns {table.column_names}); write it again: {_PREPROCESSORS}")
    columns = [column for column in (*required, "extra_info") if column in table.column_names]
    for index, record in enumerate(table.select(columns).to_pylist()):
        yield _build_row(f"{name}:{index}", record, prompt_key, reward_fn_key)


def _read_table(name: str) -> pa.Table:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"data file {name} does not exist or is not a file; {_PREPROCESSORS}")
    if path.stat().st_size == 0:
        raise ValueError(f"data file {name} is empty (0 bytes); write it again: {_PREPROCESSORS}")
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {name} as parquet: {error}; write it again: {_PREPROCESSORS}") from error


def _build_row(uid: str, record: dict[str, Any], prompt_key: str, reward_fn_key: str) -> Row:
    reward_model = record["reward_model"]
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise ValueError(f"row {uid}: reward_model = {reward_model!r} must be a mapping with a 'ground_truth'")
    data_source = record[reward_fn_key]
    if not isinstance(data_source, str):
        raise ValueError(f"row {uid}: {reward_fn_key} = {data_source!r} must be a string")
    return Row(
        uid=uid,
        prompt=_check_prompt(uid, record[prompt_key], prompt_key),
        data_source=data_source,
        ground_truth=reward_model["ground_truth"],
        extra_info=record.get("extra_info") or {},
    )


def _check_prompt(uid: str, prompt: Any, prompt_key: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) and "role" in turn for turn in prompt):
        # Parquet gives every message the keys of all messages, with null where a message did not have the key.
        return [{key: value for key, value in turn.items() if value is not None} for turn in prompt]
    raise ValueError(
        f"row {uid}: column {prompt_key!r} holds {prompt!r:.200}; expected text or a list of messages "
        "{'role': ..., 'content': ...}, not empty"
    )
