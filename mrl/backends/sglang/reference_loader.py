"""SGLang's own models and weight loaders as one rank of an engine, without an engine, to check a reshard against.

The rank and size of tensor parallelism are SGLang's own test overrides, so no process group is needed, and KV heads
are replicated as on CUDA, where an engine on CPU would pad them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.runtime_context import get_context, get_parallel
from torch import Tensor, nn
from transformers import AutoConfig

from mrl.reshard.families import families, spec_from_config


@dataclass(frozen=True)
class _Group:
    """Stands for a process group where models read its size and place from a global; it cannot communicate."""

    world_size: int
    rank_in_group: int

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


def build_engine_model(
    config: Mapping[str, Any], *, tp_rank: int, tp_size: int, dtype: torch.dtype, ep_size: int = 1
) -> nn.Module:
    """SGLang's model as rank `tp_rank` of `tp_size` holds it, on CPU, every floating point parameter NaN.

    Args:
        config: parsed config.json of a supported family.

    Raises:
        ValueError: the family is not supported, or its sizes do not fit `tp_size`.
    """
    family = families()[spec_from_config(config).family]
    model_class = getattr(import_module(f"sglang.srt.models.{family.model_type}"), family.architecture)
    hugging_face = AutoConfig.for_model(**config)
    with _engine_rank(tp_rank, tp_size, ep_size), _default_dtype(dtype):
        try:
            model: nn.Module = model_class(hugging_face)
        except AssertionError as error:
            raise ValueError(
                f"SGLang cannot cut {family.model_type} over tensor parallel size {tp_size}: {error}"
            ) from error
    for param in model.parameters():
        param.data.fill_(torch.nan)
    return model


def load_reference(
    model: nn.Module, state: Mapping[str, Tensor], *, tp_rank: int, tp_size: int, ep_size: int = 1
) -> None:
    """Fill the model with SGLang's own `load_weights` from a whole Hugging Face state dict."""
    with _engine_rank(tp_rank, tp_size, ep_size), torch.no_grad():
        model.load_weights(iter(state.items()))  # type: ignore[operator]


@contextmanager
def _engine_rank(tp_rank: int, tp_size: int, ep_size: int) -> Iterator[None]:
    at_tp, within, alone = (tp_rank, tp_size), tp_size // ep_size, (0, 1)
    axes = {"tp": at_tp, "attn_tp": at_tp, "moe_tp": (tp_rank % within, within), "moe_ep": (tp_rank // within, ep_size)}
    axes |= dict.fromkeys(("pp", "attn_dp", "attn_cp", "moe_dp"), alone)
    ranks = {f"{axis}_rank": rank for axis, (rank, _) in axes.items()}
    sizes = {f"{axis}_size": size for axis, (_, size) in axes.items()}
    groups = {"_PP": _Group(1, 0), "_TP": _Group(tp_size, tp_rank), "_MOE_DP": _Group(1, 0)}
    previous = {name: getattr(parallel_state, name) for name in groups}
    vars(parallel_state).update(groups)
    try:
        with get_context().override_server_args(device="cpu"), get_parallel().override(**ranks, **sizes):
            yield
    finally:
        vars(parallel_state).update(previous)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
