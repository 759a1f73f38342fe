"""Tokenized prompts of a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from mrl.data.rows import Row, read_rows
from mrl.types import Prompt

logger = logging.getLogger(__name__)

Truncation = Literal["error", "left", "right", "middle"]
"""What happens to a prompt that is too long: refuse it, or drop its beginning, its end or its middle."""


@dataclass(kw_only=True, frozen=True)
class PromptDataset:
    """Prompts that fit, in file order, and what became of the others."""

    prompts: list[Prompt]
    num_rows: int
    """Read from the files, after max_samples."""
    num_filtered: int
    num_truncated: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def load_prompts(
    files: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    prompt_key: str = "prompt",
    reward_fn_key: str = "data_source",
    filter_overlong_prompts: bool = False,
    truncation: Truncation = "error",
    max_samples: int = -1,
    apply_chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptDataset:
    """Read, template, tokenize and length-check the prompts of parquet files (format: `mrl.data.rows.read_rows`).

    Messages go through the tokenizer's chat template with a generation prompt. A prompt that is a plain string is
    tokenized as it stands, with the special tokens that the tokenizer adds, whether or not there is a template.

    Args:
        max_prompt_length: in tokens.
        filter_overlong_prompts: drop longer prompts; if False, `truncation` decides.
        max_samples: only the first so many rows (before filtering); -1 is all.

    Raises:
        ValueError: unreadable data (see `read_rows`), messages without a chat template, a prompt too long under
            truncation "error", an empty prompt, or no prompt left.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length = {max_prompt_length} must be at least 1")
    if truncation not in get_args(Truncation):
        raise ValueError(f"truncation = {truncation!r} must be one of {', '.join(get_args(Truncation))}")
    rows = read_rows(files, prompt_key=prompt_key, reward_fn_key=reward_fn_key, max_samples=max_samples)
    prompts = [_tokenize(row, tokenizer, dict(apply_chat_template_kwargs or {})) for row in rows]
    overlong = [prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_length]
    if filter_overlong_prompts:
        kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
        if not kept:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            raise ValueError(
                f"all {len(rows)} prompts of {files} are longer than max_prompt_length = {max_prompt_length} tokens "
                f"(the shortest has {shortest}); raise data.max_prompt_length"
            )
    else:
        kept = prompts
        for prompt in overlong:
            prompt.token_ids = _truncate(prompt, max_prompt_length, truncation)
    dataset = PromptDataset(
        prompts=kept,
        num_rows=len(rows),
        num_filtered=len(rows) - len(kept),
        num_truncated=0 if filter_overlong_prompts else len(overlong),
    )
    logger.info(
        "%s: %d prompts of %d rows; %d filtered and %d truncated at %d tokens",
        files, len(dataset), dataset.num_rows, dataset.num_filtered, dataset.num_truncated, max_prompt_length,
    )  # fmt: skip
    return dataset


def _tokenize(row: Row, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> Prompt:
    if isinstance(row.prompt, str):
        messages = [{"role": "user", "content": row.prompt}]
        token_ids = tokenizer(row.prompt)["input_ids"]
    else:
        messages = row.prompt
        token_ids = _apply_template(row, tokenizer, template_kwargs)
    if not token_ids:
        raise ValueError(f"row {row.uid}: prompt {row.prompt!r:.200} has no token; is this its model's tokenizer?")
    return Prompt(
        uid=row.uid,
        token_ids=list(token_ids),
        messages=messages,
        data_source=row.data_source,
        ground_truth=row.ground_truth,
        extra_info=row.extra_info,
    )


def _apply_template(row: Row, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"row {row.uid} holds chat messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "use an instruction-tuned model's folder, add chat_template.jinja to it, or write the prompts as plain text"
        )
    options = {"add_generation_prompt": True, **template_kwargs, "tokenize": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(row.prompt, **options)
    except Exception as error:
        raise ValueError(f"row {row.uid}: the chat template failed: {type(error).__name__}: {error}") from error


def _truncate(prompt: Prompt, length: int, truncation: Truncation) -> list[int]:
    ids = list(prompt.token_ids)
    match truncation:
        case "left":
            return ids[-length:]
        case "right":
            return ids[:length]
        case "middle":
            head = length // 2
            return ids[:head] + ids[len(ids) - (length - head) :]
        case "error":
            raise ValueError(
                f"prompt {prompt.uid} has {len(ids)} tokens, max_prompt_length is {length}; raise "
                "data.max_prompt_length, set data.filter_overlong_prompts=True, or set data.truncation"
            )
