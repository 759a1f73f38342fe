"""Batches that name the experts of their tokens, and transformers made to use these."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron_reference import Reference, make_batch
from torch import Tensor

from mrl.types import TrainBatch

LAYERS = 4
EXPERTS = {"qwen3_moe": (8, 3), "mixtral": (4, 2)}
"""Of each layer, and of each token, in the families' tiny models."""


def batch_with_experts(vocab_size: int, family: str, *, seed: int) -> TrainBatch:
    """Samples with random experts, which no router would choose."""
    batch = make_batch(vocab_size, 7, seed=seed)
    experts, k = EXPERTS[family]
    generator = torch.Generator().manual_seed(seed)
    routed = []
    for length in batch.lengths.tolist():
        scores = torch.rand(length - 1, LAYERS, experts, generator=generator)
        routed.append(scores.topk(k).indices.flatten(1).to(torch.uint8))
    return batch.with_fields(routed_experts=routed)


class ForcedReference(Reference):
    """Transformers whose gates are told what to choose."""

    def outputs(self, batch: TrainBatch) -> dict[str, Tensor]:
        assert batch.routed_experts is not None
        rows, width = batch.tokens.shape
        given = torch.full((rows, width, batch.routed_experts[0].shape[1]), -1)
        for row, experts in zip(given, batch.routed_experts, strict=True):
            row[: len(experts)] = experts
        for layer, choices in zip(self.model.model.layers, given.flatten(0, 1).chunk(LAYERS, dim=1), strict=True):
            layer.mlp.gate.forward = partial(_forced, layer.mlp.gate, choices)
        return super().outputs(batch)


def _forced(gate: Any, choices: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, own = type(gate).forward(gate, hidden)
    chosen = torch.where(choices < 0, own, choices)
    weights = logits.softmax(-1).gather(1, chosen)
    if getattr(gate, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, chosen
