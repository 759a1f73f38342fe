"""From samples to the padded tensors that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mrl.types import Prompt, Sample, TrainBatch


class Decoder(Protocol):
    """The one method of a Hugging Face tokenizer that is needed here."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]: ...


def build_batch(samples: Sequence[Sample], *, pad_token_id: int) -> TrainBatch:
    """Samples as a batch: prompt, response, padding up to the longest sample.

    `loss_mask` is True on response tokens that the model wrote; `rollout_log_probs` holds the engine's log-prob of each
    of them at the same position, 0 elsewhere.

    Raises:
        ValueError: no samples, an empty prompt or response, or not one log-prob per response token.
    """
    if not samples:
        raise ValueError("cannot build a batch of no samples")
    for sample in samples:
        _check(sample)
    prompts = [len(sample.prompt.token_ids) for sample in samples]
    lengths = [prompt + len(sample.generation.response_ids) for prompt, sample in zip(prompts, samples, strict=True)]
    shape = len(samples), max(lengths)
    batch = TrainBatch(
        tokens=torch.full(shape, pad_token_id),
        lengths=torch.tensor(lengths),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        rollout_log_probs=torch.zeros(shape),
        routed_experts=_routed_experts(samples),
    )
    _fill(batch, samples, prompts, lengths)
    return batch


def _fill(batch: TrainBatch, samples: Sequence[Sample], prompts: Sequence[int], lengths: Sequence[int]) -> None:
    """Write the samples' tokens and log-probs; `prompts` and `lengths` are the tokens of each prompt and sample."""
    tokens, loss_mask = batch.tokens.numpy(), batch.loss_mask.numpy()
    rollout_log_probs = batch.required("rollout_log_probs").numpy()
    last: Prompt | None = None
    for row, (sample, prompt, length) in enumerate(zip(samples, prompts, lengths, strict=True)):
        # A prompt's samples lie side by side: its list of Python numbers is read once.
        tokens[row, :prompt] = sample.prompt.token_ids if sample.prompt is not last else tokens[row - 1, :prompt]
        tokens[row, prompt:length] = sample.generation.response_ids
        mask = sample.generation.response_mask
        loss_mask[row, prompt:length] = True if mask is None else mask
        rollout_log_probs[row, prompt:length] = sample.generation.rollout_log_probs
        last = sample.prompt


def _routed_experts(samples: Sequence[Sample]) -> list[Tensor] | None:
    """Of all samples, or None where the engines did not report them."""
    experts = [sample.generation.routed_experts for sample in samples]
    present = [each for each in experts if each is not None]
    if present and len(present) < len(experts):
        raise ValueError(f"only {len(present)} of {len(experts)} samples come with their routed experts")
    return present or None


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
