"""The tokens between two answers of a model: what the chat template puts around and between messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_ANSWER = f"answer-{uuid.uuid4().hex}"
"""Stands for the model's answer, whose own tokens are never encoded again. No message contains it."""


class TurnEncoder:
    """Encodes the messages that follow an answer, up to where the model answers them.

    The answer's tokens stay what they are: encoded again from their text they might be others, of which the engine's
    log-probs say nothing.

    Args:
        template_kwargs: of the chat template, as for the prompts.

    Raises:
        ValueError: the tokenizer has no chat template, one that does not show an answer as it is, or an end of sequence
            that is no token of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        if tokenizer.chat_template is None:
            raise ValueError("conversations need a tokenizer with a chat template; this one has none")
        self.encode([{"role": "user", "content": "1"}], last_token=tokenizer.eos_token_id)

    def encode(self, messages: Sequence[dict[str, Any]], *, last_token: int) -> list[int]:
        """Token ids from behind an answer to where the model answers `messages`.

        Args:
            last_token: of the answer. Where it is what the template ends an answer with, that is not repeated.

        Raises:
            ValueError: the template cannot show the messages.
        """
        after, ended = self._after_answer(messages), self._tokenizer.decode([last_token])
        before, found, rest = after.partition(ended)
        is_shown = bool(found) and not before.strip()
        # With the last token in front: encoded alone, the rest might begin otherwise than behind it.
        ids = self._tokenizer(ended + (rest if is_shown else after), add_special_tokens=False)["input_ids"]
        if last_token not in ids:
            raise ValueError(f"the answer's last token, {last_token}, is not that of its own text {ended!r}")
        return list(ids[ids.index(last_token) + 1 :])

    def decode(self, answer: Sequence[int], *, has_ended: bool) -> str:
        """An answer's text, with the marks of tool calls that are tokens of their own, without the token that ended it.

        Args:
            has_ended: whether the last token is one that ends answers.
        """
        return str(self._tokenizer.decode(list(answer)[: -1 if has_ended else None], skip_special_tokens=False))

    def _after_answer(self, messages: Sequence[dict[str, Any]]) -> str:
        conversation = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _ANSWER}, *messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, **{**self._template_kwargs, "tokenize": False, "add_generation_prompt": True}
            )
        except Exception as error:
            raise ValueError(f"the chat template cannot show {messages!r:.300}: {error}") from error
        _, found, after = str(text).partition(_ANSWER)
        if not found or _ANSWER in after:
            raise ValueError(f"the chat template does not show an answer once, as it is: {text!r:.300}")
        return after
