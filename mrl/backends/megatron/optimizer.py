"""Megatron's optimizer and learning-rate schedule from plain settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from mrl.backends.megatron.model import ModelChunk


@dataclass(kw_only=True, frozen=True)
class OptimizerSettings:
    """AdamW and its schedule; steps count optimizer updates."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """On matrices; biases and norm weights are not decayed."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 is off."""
    lr_warmup_steps: int = 0
    lr_warmup_init: float = 0.0
    """Learning rate of the first warm-up step."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    lr_decay_steps: int | None = None
    """Step at which `min_lr` is reached; needed unless the style is constant."""
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or not 0 <= self.lr_warmup_init <= self.lr:
            raise ValueError(
                f"learning rates must satisfy 0 <= min_lr ({self.min_lr}), lr_warmup_init ({self.lr_warmup_init}) <= "
                f"lr ({self.lr})"
            )
        if self.lr_decay_style != "constant" and (self.lr_decay_steps or 0) <= self.lr_warmup_steps:
            raise ValueError(
                f"lr_decay_style = {self.lr_decay_style} needs lr_decay_steps ({self.lr_decay_steps}) greater than "
                f"lr_warmup_steps ({self.lr_warmup_steps})"
            )


@dataclass(kw_only=True, frozen=True)
class DataParallelSettings:
    """How gradients are reduced and optimizer state is placed."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    """With the distributed optimizer: gather updated parameters during the next forward pass."""
    bucket_size: int | None = None
    """Elements per gradient bucket under overlap_grad_reduce; None is Megatron's choice."""
    resumable: bool = True
    """Refuse at start a bucket layout whose optimizer state could not be saved and loaded in another layout."""

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce")


def chained_optimizers(optimizer: Any) -> list[Any]:
    """Megatron's optimizers of a role: one, and another one for a model's experts, whose replicas are others."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def wrap_data_parallel(
    chunks: Sequence[ModelChunk], settings: DataParallelSettings, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers and their reduction over dp_group. Called by all ranks of the role.

    Raises:
        ValueError: the bucket layout corrupts checkpoints; see `check_resumable`.
    """
    wrapped = []
    for number, chunk in enumerate(chunks):
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            overlap_grad_reduce=settings.overlap_grad_reduce,
            overlap_param_gather=settings.overlap_param_gather,
            bucket_size=settings.bucket_size,
        )
        # Chunks after the first reduce off the critical path: one bucket, as megatron's own training does.
        module = DistributedDataParallel(
            chunk.bare.config, config, chunk.module, disable_bucketing=number > 0, pg_collection=groups
        )
        _fuse_gradient_accumulation(module)
        wrapped.append(module)
    return wrapped


def _fuse_gradient_accumulation(module: DistributedDataParallel) -> None:
    """Have transformer-engine's matrix products add weight gradients to the float32 buffers themselves.

    Megatron's own setting for this does not start without apex's extension, which its output layer would need.
    """
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True


def check_resumable(modules: Sequence[DistributedDataParallel]) -> None:
    """Raise ValueError if megatron would corrupt the distributed optimizer's state on saving or loading.

    Its `fully_reshardable` format drops the padding between buckets from the data but not from the index.
    """
    for module in modules:
        if not module.ddp_config.use_distributed_optimizer:
            continue
        for buffer in chain(module.buffers, module.expert_parallel_buffers):
            for number, bucket in enumerate(buffer.buckets[:-1]):
                size, unpadded = bucket.grad_data.numel(), bucket.numel_unpadded
                if size != unpadded:
                    raise ValueError(
                        f"gradient bucket {number} of {len(buffer.buckets)} is padded from {unpadded} to {size} "
                        "elements, and megatron corrupts the distributed optimizer's checkpoints of such buckets; "
                        "turn off overlap_grad_reduce, use a hidden_size that is a multiple of 128, or turn off "
                        "use_distributed_optimizer"
                    )


def check_adam() -> None:
    """Raise RuntimeError if megatron uses torch.optim.AdamW, whose `step` a resumed run advances once per parameter."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        raise RuntimeError("megatron fell back to torch.optim.AdamW, with which runs do not resume correctly")


def build_optimizer(
    modules: Sequence[DistributedDataParallel],
    settings: OptimizerSettings,
    groups: ProcessGroupCollection,
    *,
    dtype: torch.dtype,
) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's optimizer and its learning-rate scheduler. Called by all ranks of the role."""
    check_adam()
    ddp_config = modules[0].ddp_config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        list(modules),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    return optimizer, _build_scheduler(optimizer, settings)


def _build_scheduler(optimizer: Any, settings: OptimizerSettings) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=settings.lr_decay_steps or settings.lr_warmup_steps + 1,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
