"""How the experts of a live model are dealt out and laid out."""

from __future__ import annotations

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch import nn

_REMEDY = "set engine_kwargs.sglang.moe_runner_backend to triton"


def expert_parallel_size(model: nn.Module) -> int:
    """Into how many groups the engine's ranks share out the experts; 1 of a model without experts.

    Raises:
        ValueError: SGLang keeps the experts in another order than [gate; up] and [down], and a pull would not know it.
    """
    size = 1
    for name, module in model.named_modules():
        if isinstance(module, FusedMoE):
            _check_order(name, module)
            size = module.moe_ep_size
    return size


def _check_order(name: str, module: FusedMoE) -> None:
    method = module.quant_method
    if type(method) is not UnquantizedFusedMoEMethod:
        raise ValueError(
            f"{name} is quantized ({type(method).__name__}); experts can be resharded unquantized only: use a model "
            "and engine_kwargs.sglang without quantization"
        )
    backend = method.runner.runner_backend
    if not backend.is_triton():
        raise ValueError(
            f"{name} uses SGLang's MoE backend {backend.value}, which may permute the experts' weights; {_REMEDY}"
        )
    if method._aiter_runner is not None:
        raise ValueError(f"{name} uses SGLang's MoE backend aiter, which shuffles the experts' weights; {_REMEDY}")
