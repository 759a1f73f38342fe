"""The critic's head: one value per token instead of one logit per vocabulary entry."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class ValueHead(torch.nn.Linear):
    """Linear [hidden] -> [1], replicated over tp_group; takes the place of GPTModel.output_layer.

    Under sequence parallelism each rank computes the values of its part of the sequence and the parts are gathered;
    the marked parameters' gradients are summed over tp_group by `finalize_model_grads`.
    """

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config.hidden_size, 1, dtype=config.params_dtype)
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    @torch.no_grad()
    def reset(self, *, std: float, seed: int) -> None:
        """Draw the weight from N(0, std), the same on every rank, and zero the bias."""
        generator = torch.Generator().manual_seed(seed)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * std)
        self.bias.zero_()

    @torch.no_grad()
    def load_score(self, weight: Tensor) -> None:
        """Take a classifier's weight, [1, hidden]; it has no bias."""
        self.weight.copy_(weight)
        self.bias.zero_()

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """[t, b, hidden] (t/tp under sequence parallelism) -> ([t, b, 1] float32, no bias)."""
        values = super().forward(hidden).float()
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What dist_checkpointing stores; `metadata` must carry the role's "dp_cp_group"."""
        assert metadata is not None, "metadata['dp_cp_group'] is needed; the global groups may be another role's"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
