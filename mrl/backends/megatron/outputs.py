"""From what the last pipeline stage computes to a `ModelOutput` aligned with the tokens."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from mrl.backends.megatron.inputs import ModelInputs
from mrl.parallel.vocab_parallel import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy


def log_prob_output(
    logits: Tensor,
    inputs: ModelInputs,
    *,
    tp_group: dist.ProcessGroup,
    cp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
) -> dict[str, Tensor]:
    """`log_probs` and, if asked for, `entropy`, [b, t] float32. Called by all of both groups, on the last stage.

    The backward pass overwrites the logits with their gradient: the output layer, whose they are, computes its own
    gradients from its input and its weight.

    Args:
        logits: [b, t, V/tp] or packed [1, N / cp, V/tp], padded vocabulary; the model's output, used here only.
        vocab_size: without padding.
    """
    options: dict[str, Any] = {
        "tp_group": tp_group,
        "vocab_size": vocab_size,
        "temperature": temperature,
        "inplace_backward": True,
    }
    if not with_entropy:
        return {"log_probs": _align(vocab_parallel_log_probs(logits, inputs.targets, **options), inputs, cp_group)}
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(logits, inputs.targets, **options)
    return {"log_probs": _align(log_probs, inputs, cp_group), "entropy": _align(entropy, inputs, cp_group)}


def value_output(values: Tensor, inputs: ModelInputs, *, cp_group: dist.ProcessGroup) -> dict[str, Tensor]:
    """`values`, [b, t] float32, from the value head's [b, t, 1] or packed [1, N / cp, 1]. Called by all of cp_group."""
    return {"values": _align(values.float().squeeze(-1), inputs, cp_group)}


def _align(predicted: Tensor, inputs: ModelInputs, cp_group: dist.ProcessGroup) -> Tensor:
    """Whole samples on each rank that shares them, for losses that look at whole samples.

    Every rank computes the same loss; what flows back into it is the gradient of its own predictions.
    """
    aligned = inputs.align(predicted)
    return reduce_from_tensor_model_parallel_region(aligned, group=cp_group) if cp_group.size() > 1 else aligned
