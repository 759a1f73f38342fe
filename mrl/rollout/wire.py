"""Generations as two flat tensors, for sending between ranks. Pickled lists of Python numbers are ten times larger."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
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
    header = [
        number
        for index, each in generations.items()
        for number in (index, len(each.response_ids), _REASONS.index(each.finish_reason), each.weight_version)
    ]
    tokens = [np.asarray(each.response_ids, dtype=np.int32) for each in generations.values()]
    log_probs = [np.asarray(each.rollout_log_probs, dtype=np.float32) for each in generations.values()]
    numbers = np.concatenate([np.array(header, dtype=np.int32), *tokens])
    return torch.from_numpy(numbers), torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *log_probs]))


def decode(numbers: Tensor, log_probs: Tensor) -> dict[int, Generation]:
    """The inverse of `encode`; log-probs come back rounded to float32."""
    split = numbers.numel() - log_probs.numel()
    tokens, values = memoryview(numbers[split:].numpy()), memoryview(log_probs.numpy())
    generations: dict[int, Generation] = {}
    begin = 0
    for index, length, reason, weight_version in numbers[:split].view(-1, _HEADER).tolist():
        part = slice(begin, begin + length)
        generations[index] = Generation(
            response_ids=_copy("i", tokens[part]),
            rollout_log_probs=_copy("f", values[part]),
            finish_reason=_REASONS[reason],
            weight_version=weight_version,
        )
        begin += length
    return generations


def _copy[Number: (int, float)](typecode: Literal["i", "f"], part: memoryview) -> array[Number]:
    copy: array[Number] = array(typecode)
    copy.frombytes(part.cast("B"))
    return copy
