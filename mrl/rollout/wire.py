"""Generations as two flat tensors, for sending between ranks. Pickled lists of Python numbers are ten times larger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from mrl.types import FinishReason, Generation

_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_HEADER = 4


def encode(generations: Mapping[int, Generation]) -> tuple[Tensor, Tensor]:
    """Generations by prompt index as (numbers [4 S + N] int32, log-probs [N] float32); S samples, N response tokens.

    `numbers` starts with (index, response length, finish reason, weight version) of each sample; then come all token
    ids.
    """
    header: list[int] = []
    tokens: list[int] = []
    log_probs: list[float] = []
    for index, generation in generations.items():
        reason = _REASONS.index(generation.finish_reason)
        header += [index, len(generation.response_ids), reason, generation.weight_version]
        tokens += generation.response_ids
        log_probs += generation.rollout_log_probs
    return torch.tensor(header + tokens, dtype=torch.int32), torch.tensor(log_probs, dtype=torch.float32)


def decode(numbers: Tensor, log_probs: Tensor) -> dict[int, Generation]:
    """The inverse of `encode`; log-probs come back rounded to float32."""
    num_tokens = log_probs.numel()
    split = numbers.numel() - num_tokens
    header = numbers[:split].view(-1, _HEADER).tolist()
    tokens, values = numbers[split:].tolist(), log_probs.tolist()
    generations: dict[int, Generation] = {}
    begin = 0
    for index, length, reason, weight_version in header:
        end = begin + length
        generations[index] = Generation(
            response_ids=tokens[begin:end],
            rollout_log_probs=values[begin:end],
            finish_reason=_REASONS[reason],
            weight_version=weight_version,
        )
        begin = end
    return generations
