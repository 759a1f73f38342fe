"""RMSNorm for Megatron's local layer spec, under sequence parallelism too."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over tp_group under sequence parallelism.

    Megatron's own wrapper of the torch module refuses sequence parallelism. There each rank sees only its part of the
    sequence; the mark on the weight makes `finalize_model_grads` add the parts up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
