"""From what the last pipeline stage computes to a `ModelOutput` aligned with the tokens.

Megatron's output at position t predicts token t + 1; entry t of every result here belongs to token t. Entry 0 and the
padding are 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mrl.parallel.vocab_parallel import vocab_parallel_log_probs, vocab_parallel_log_probs_and_entropy
from mrl.types import TrainBatch


def log_prob_output(
    logits: Tensor,
    batch: TrainBatch,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
) -> dict[str, Tensor]:
    """`log_probs` and, if asked for, `entropy`, [b, t] float32. Called by all of tp_group, on the last stage.

    Args:
        logits: [b, t, V/tp], padded vocabulary.
        vocab_size: without padding.
    """
    targets = batch.tokens.roll(-1, dims=1)
    if not with_entropy:
        log_probs = vocab_parallel_log_probs(
            logits, targets, tp_group=tp_group, vocab_size=vocab_size, temperature=temperature
        )
        return {"log_probs": _belonging_to_tokens(log_probs, batch)}
    log_probs, entropy = vocab_parallel_log_probs_and_entropy(
        logits, targets, tp_group=tp_group, vocab_size=vocab_size, temperature=temperature
    )
    return {"log_probs": _belonging_to_tokens(log_probs, batch), "entropy": _belonging_to_tokens(entropy, batch)}


def value_output(values: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
    """`values`, [b, t] float32, from the value head's [b, t, 1]."""
    return {"values": _belonging_to_tokens(values.float().squeeze(-1), batch)}


def _belonging_to_tokens(predicted: Tensor, batch: TrainBatch) -> Tensor:
    """Shift from the position that predicts to the token predicted; zero at entry 0 and past each sample's length."""
    shifted = torch.nn.functional.pad(predicted[:, :-1], (1, 0))
    is_padding = torch.arange(shifted.shape[1], device=shifted.device) >= batch.lengths.unsqueeze(1)
    return shifted.masked_fill(is_padding, 0.0)
