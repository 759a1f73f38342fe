"""Tokenizers from local model folders, with the end-of-sequence ids that generation has to stop at."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder; one without a padding token pads with its end-of-sequence token.

    Raises:
        ValueError: the folder or its vocabulary is missing or unreadable, or the tokenizer has no end-of-sequence
            token.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"model folder {path} does not exist; download the model first and give its local folder")
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        # AutoTokenizer makes an empty tokenizer of such a folder, which drops every character.
        raise ValueError(f"{path} holds no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); copy its files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load the tokenizer of {path}: {type(error).__name__}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} names no eos_token; set it in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        logger.info("tokenizer of %s has no padding token; padding with %r", path, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_eos_token_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response, ascending: the tokenizer's and those of generation_config.json.

    Chat models often list more than one there (end of turn, end of text). Without that file config.json is read.

    Raises:
        ValueError: the file is not JSON, or its `eos_token_id` is neither an integer nor a list of integers.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder).expanduser() / name
        if path.is_file():
            ids.update(_read_eos_token_ids(path))
            break
    return tuple(sorted(ids))


def _read_eos_token_ids(path: Path) -> list[int]:
    try:
        listed = json.loads(path.read_text()).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{path}: eos_token_id = {listed!r} must be an integer or a list of integers")
    return ids
