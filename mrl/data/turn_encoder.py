"""The tokens between two answers of a model: what the chat template puts around and between messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_ANSWER = "mrl-answer-5d1f"
"""Stands for the model's answer, whose own tokens are never encoded again."""


class TurnEncoder:
    """Encodes the messages that follow an answer, up to where the model answers them.

    The answer's tokens stay what they are: encoded again from their text they might be others, of which the engine's
    log-probs say nothing.

    Args:
        template_kwargs: of the chat template, as for the prompts.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not show an answer as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        if tokenizer.chat_template is None:
            raise ValueError("conversations need a tokenizer with a chat template; this one has none")
        self._after_answer([{"role": "user", "content": "1"}])

    def encode(self, messages: Sequence[dict[str, Any]], *, last_token: int) -> list[int]:
        """Token ids from behind an answer to where the model answers `messages`.

        Args:
            last_token: of the answer. Where it is what the template ends an answer with, that is not repeated.

        Raises:
            ValueError: the template cannot show the messages.
        """
        text = self._after_answer(messages).removeprefix(self._tokenizer.decode([last_token]))
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, answer: Sequence[int]) -> str:
        """An answer's text without special tokens."""
        return str(self._tokenizer.decode(list(answer), skip_special_tokens=True))

    def _after_answer(self, messages: Sequence[dict[str, Any]]) -> str:
        conversation = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _ANSWER}, *messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, **self._template_kwargs
            )
        except Exception as error:
            raise ValueError(f"the chat template cannot show {messages!r:.300}: {error}") from error
        _, found, after = str(text).partition(_ANSWER)
        if not found or _ANSWER in after:
            raise ValueError(f"the chat template does not show an answer once, as it is: {text!r:.300}")
        return after
