"""From samples to the padded tensors that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from mrl.types import Sample, TrainBatch


class Decoder(Protocol):
    """The one method of a Hugging Face tokenizer that is needed here."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]: ...


def build_batch(samples: Sequence[Sample], *, pad_token_id: int, multiple: int = 1) -> TrainBatch:
    """Samples as a batch: prompt, response, padding up to the longest sample, rounded up to `multiple` tokens.

    `loss_mask` is True on response tokens; `rollout_log_probs` holds the engine's log-prob of each of them at the same
    position, 0 elsewhere.

    Raises:
        ValueError: no samples, an empty prompt or response, or not one log-prob per response token.
    """
    if not samples:
        raise ValueError("cannot build a batch of no samples")
    for sample in samples:
        _check(sample)
    prompts = [len(sample.prompt.token_ids) for sample in samples]
    lengths = [prompt + len(sample.generation.response_ids) for prompt, sample in zip(prompts, samples, strict=True)]
    width = -(-max(lengths) // multiple) * multiple
    tokens = np.empty((len(samples), width), dtype=np.int64)
    loss_mask = np.zeros((len(samples), width), dtype=np.bool_)
    rollout_log_probs = np.zeros((len(samples), width), dtype=np.float32)
    for row, (sample, prompt, length) in enumerate(zip(samples, prompts, lengths, strict=True)):
        tokens[row, :prompt] = sample.prompt.token_ids
        tokens[row, prompt:length] = sample.generation.response_ids
        tokens[row, length:] = pad_token_id
        loss_mask[row, prompt:length] = True
        rollout_log_probs[row, prompt:length] = sample.generation.rollout_log_probs
    return TrainBatch(
        tokens=torch.from_numpy(tokens),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        loss_mask=torch.from_numpy(loss_mask),
        rollout_log_probs=torch.from_numpy(rollout_log_probs),
    )


def decode_responses(samples: Sequence[Sample], tokenizer: Decoder) -> list[str]:
    """The samples' responses without special tokens, so without the stop token."""
    responses = [list(sample.generation.response_ids) for sample in samples]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


def _check(sample: Sample) -> None:
    generation, uid = sample.generation, sample.prompt.uid
    if not sample.prompt.token_ids or not generation.response_ids:
        raise ValueError(
            f"sample {uid} has {len(sample.prompt.token_ids)} prompt and {len(generation.response_ids)} response "
            "tokens; each needs at least one (the first token of a sample has no log-prob)"
        )
    if len(generation.rollout_log_probs) != len(generation.response_ids):
        raise ValueError(
            f"sample {uid} has {len(generation.rollout_log_probs)} log-probs for {len(generation.response_ids)} tokens"
        )
