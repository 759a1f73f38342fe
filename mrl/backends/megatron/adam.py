"""Stand-in for the fused Adam of transformer-engine or apex where neither is installed.

Megatron then falls back to torch.optim.AdamW, which keeps one `step` tensor per parameter; after loading a
distributed-optimizer checkpoint all parameters share a single one, and it advances once per parameter instead of once
per update. Like the fused optimizers, this one keeps `step` as a number in the parameter group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam and AdamW with the constructor and the state layout of the fused optimizers.

    Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for settings in self.param_groups:
            if not settings["params"]:
                continue
            settings["step"] = int(settings.get("step", 0)) + 1
            for param in settings["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, settings)

    def _update(self, param: Tensor, grad: Tensor, settings: dict[str, Any]) -> None:
        beta1, beta2 = settings["betas"]
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        if settings["weight_decay"] and self.adam_w_mode:
            param.mul_(1 - settings["lr"] * settings["weight_decay"])
        elif settings["weight_decay"]:
            grad = grad.add(param, alpha=settings["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correct = settings["bias_correction"]
        scale1 = 1 - beta1 ** settings["step"] if correct else 1.0
        scale2 = 1 - beta2 ** settings["step"] if correct else 1.0
        denominator = (state["exp_avg_sq"].sqrt() / scale2**0.5).add_(settings["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-settings["lr"] / scale1)


def install_adam_if_missing() -> None:
    """Make megatron use `FusedAdam` where it found neither transformer-engine's nor apex's."""
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    megatron_optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_APEX_OPTIMIZER = True
