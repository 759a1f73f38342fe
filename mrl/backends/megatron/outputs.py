"""From what the last pipeline stage computes to a `ModelOutput` aligned with the tokens."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mrl.backends.megatron.inputs import ModelInputs
from mrl.parallel.vocab_parallel import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy


def log_prob_output(
    logits: Tensor,
    inputs: ModelInputs,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
) -> dict[str, Tensor]:
    """`log_probs` and, if asked for, `entropy`, [b, t] float32. Called by all of tp_group, on the last stage.

    Args:
        logits: [b, t, V/tp] or packed [1, N, V/tp], padded vocabulary.
        vocab_size: without padding.
    """
    if not with_entropy:
        log_probs = vocab_parallel_log_probs(
            logits, inputs.targets, tp_group=tp_group, vocab_size=vocab_size, temperature=temperature
        )
        return {"log_probs": inputs.align(log_probs)}
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(
        logits, inputs.targets, tp_group=tp_group, vocab_size=vocab_size, temperature=temperature
    )
    return {"log_probs": inputs.align(log_probs), "entropy": inputs.align(entropy)}


def value_output(values: Tensor, inputs: ModelInputs) -> dict[str, Tensor]:
    """`values`, [b, t] float32, from the value head's [b, t, 1] or packed [1, N, 1]."""
    return {"values": inputs.align(values.float().squeeze(-1))}
