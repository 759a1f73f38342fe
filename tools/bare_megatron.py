"""The ceiling of a training step: megatron-core's own model, loss, gradient buffers and optimizer, called directly."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from mrl.backends.megatron.groups import build_groups, destroy_groups
from mrl.backends.megatron.hf_weights import load_weights
from mrl.backends.megatron.inputs import ModelInputs
from mrl.backends.megatron.model import Recompute, build_chunks, transformer_config
from mrl.backends.megatron.role_state import RoleState
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec


class BareMegatron:
    """`GPTModel(labels=...)` under DistributedDataParallel with the distributed optimizer, data parallel only."""

    def __init__(self, model: str, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        layout = ParallelLayout(world_size=dist.get_world_size())
        self._state = RoleState()
        with self._state:
            self._groups = build_groups(layout, seed=0, timeout_s=1800)
            config = transformer_config(spec, layout, dtype=dtype, recompute=Recompute())
            config = replace(config, bias_dropout_fusion=device.type == "cuda")
            (chunk,) = build_chunks(spec, layout, config, self._groups, has_value_head=False, device=device)
            load_weights(model, spec, chunk.named_parameters(), tp_rank=0, tp_size=1)
            self._module = DistributedDataParallel(
                config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
                chunk.module,
                pg_collection=self._groups,
            )
            self._optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-6,
                    weight_decay=0.01,
                    clip_grad=1.0,
                    bf16=dtype is torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=True,
                ),
                [self._module],
                use_gloo_process_groups=False,
                pg_collection=self._groups,
            )
        self._config = chunk.bare.config

    def fuse_loss(self) -> bool:
        """From now on take transformer-engine's cross-entropy instead of the plain one; False where there is none."""
        self._config.cross_entropy_loss_fusion = HAVE_TE
        self._config.cross_entropy_fusion_impl = "te"
        return HAVE_TE

    def train(self, inputs: ModelInputs) -> None:
        """One optimizer step on the packed batch."""
        with self._state:
            self._module.zero_grad_buffer()
            self._optimizer.zero_grad()
            self._loss(inputs).mean().backward()
            finalize_model_grads([self._module], None, pg_collection=self._groups)
            self._optimizer.step()

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """The losses of the packed batch, [1, N]."""
        with self._state:
            return self._loss(inputs)

    def _loss(self, inputs: ModelInputs) -> torch.Tensor:
        return self._module(
            inputs.tokens, inputs.positions, None, labels=inputs.targets, packed_seq_params=inputs.packed
        )

    def close(self) -> None:
        """Give everything back."""
        with self._state:
            destroy_groups()
        del self._module, self._optimizer, self._config
