"""Requests to and answers from SGLang, in this package's types."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mrl.interfaces import EngineError
from mrl.types import FinishReason, Generation, SamplingParams

_LOWEST_LOG_PROB = -1e30
"""SGLang clamps the log of a probability of 0 to float32's lowest number."""


def sampling_dict(params: SamplingParams) -> dict[str, Any]:
    """SGLang's sampling parameters.

    Raises:
        ValueError: a value SGLang cannot honour when it runs without a tokenizer, or one out of range.
    """
    if params.stop:
        raise ValueError(
            f"stop strings {list(params.stop)} need a tokenizer in the engine, which gets and returns token ids only; "
            "pass stop_token_ids, or cut the text after decoding"
        )
    if params.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {params.max_new_tokens} must be at least 1")
    if params.temperature < 0 or not math.isfinite(params.temperature):
        raise ValueError(f"temperature = {params.temperature} must be 0 (greedy) or positive")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p = {params.top_p} must lie in (0, 1]")
    if params.top_k != -1 and params.top_k < 1:
        raise ValueError(f"top_k = {params.top_k} must be -1 (off) or at least 1")
    if params.ignore_eos and params.stop_token_ids:
        raise ValueError(
            f"ignore_eos = True makes the engine ignore stop_token_ids = {list(params.stop_token_ids)} too; set one"
        )
    return {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
    }


def check_prompts(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_tokens: int) -> None:
    """Refuse prompts that SGLang would cut silently.

    Raises:
        ValueError: an empty prompt, or one that leaves less than `max_new_tokens` of `max_tokens`.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        if len(prompt) + max_new_tokens > max_tokens:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens = {max_new_tokens} that is more than "
                f"the {max_tokens} the engine can hold (context_length and max_total_tokens); shorten one or raise them"
            )


def generation_of(output: Mapping[str, Any], params: SamplingParams) -> Generation:
    """One answer of SGLang to a request with these parameters.

    Raises:
        EngineError: log-probs that are missing, not finite or of probability 0; an answer ended by NaN logits, or cut
            before `max_new_tokens` because the engine ran out of room; experts missing that were asked for.
    """
    meta = output["meta_info"]
    response_ids = array("i", output["output_ids"])
    log_probs = np.array([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float64)
    reason = meta["finish_reason"]
    if reason["type"] == "stop" and not isinstance(reason.get("matched"), int):
        raise EngineError(f"engine stopped a response for {reason.get('matched')!r}; are its weights finite?")
    if reason["type"] == "length" and len(response_ids) < params.max_new_tokens:
        raise EngineError(
            f"engine cut a response at {len(response_ids)} of {params.max_new_tokens} tokens; raise max_total_tokens "
            "or context_length"
        )
    if len(log_probs) != len(response_ids):
        raise EngineError(f"engine returned {len(log_probs)} log-probs for {len(response_ids)} tokens")
    if not np.all(np.isfinite(log_probs) & (log_probs > _LOWEST_LOG_PROB)):
        raise EngineError("engine returned a log-prob that is not finite; are its weights finite?")
    return Generation(
        response_ids=response_ids,
        rollout_log_probs=array("f", log_probs.astype(np.float32).tobytes()),
        finish_reason=cast(FinishReason, reason["type"]),
        weight_version=int(meta["weight_version"]),
        routed_experts=_routed_experts(meta, len(response_ids)) if params.return_routed_experts else None,
    )


def pack_experts(output: dict[str, Any]) -> dict[str, Any]:
    """The same answer with its experts, which arrive as text of four bytes each, in one byte where they fit."""
    text = output["meta_info"].get("routed_experts")
    if text is not None:
        numbers = np.frombuffer(base64.b64decode(text), dtype=np.int32)
        fits = numbers.size > 0 and numbers.min() >= 0 and numbers.max() < 256
        output["meta_info"]["routed_experts"] = numbers.astype(np.uint8 if fits else np.int16)
    return output


def _routed_experts(meta: Mapping[str, Any], response_length: int) -> Tensor:
    """[prompt + response - 1, layers k] uint8 or int16."""
    numbers = meta.get("routed_experts")
    if numbers is None:
        raise EngineError(
            "engine did not report the experts of its tokens; start it with engine_kwargs "
            "enable_return_routed_experts=True, and with a model that has experts"
        )
    rows = int(meta["prompt_tokens"]) + response_length - 1
    if len(numbers) == 0 or len(numbers) % rows:
        raise EngineError(f"engine reported {len(numbers)} experts for {rows} tokens, not equally many for each")
    return torch.from_numpy(numbers).view(rows, -1)
