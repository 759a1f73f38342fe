"""Giving a role's device memory back while others work, and taking it again when the role is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from mrl.backends.host_copies import Copier, HostCopies
from mrl.backends.megatron.optimizer import chained_optimizers


@dataclass(kw_only=True, frozen=True)
class OffloadSettings:
    """What leaves the device between a role's uses. On CPU nothing does."""

    parameters: bool = False
    """To pinned host memory. Not for a role whose weights are exported: engines read them in place."""
    gradients: bool = False
    """Released: they are zero between updates."""
    optimizer: bool = False
    """Main copies and moments, to pinned host memory."""


class RoleOffload:
    """Offload of one role's parameters, gradients and optimizer state, as configured.

    Nothing here waits for the device. What is away comes back when it is asked for: parameters before a pass,
    gradients and optimizer state for an update, so that a role that is not updated never brings its optimizer.

    Args:
        copier: None where there is no device to free; then nothing leaves.
    """

    def __init__(
        self,
        settings: OffloadSettings,
        copier: Copier | None,
        *,
        parameters: Sequence[torch.nn.Parameter],
        modules: Sequence[DistributedDataParallel],
        optimizer: Any,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._modules = modules if copier else ()
        self._leaves_gradients = settings.gradients
        self._gradients_away = False
        # Views of the parameters are in more hands than can be known; those of the optimizer's state are not.
        self._parameter_copies = HostCopies(copier, packs=False) if copier and settings.parameters else None
        self._state_copies = HostCopies(copier, packs=True) if copier and settings.optimizer and optimizer else None

    @property
    def parameters_are_away(self) -> bool:
        """Whether they are on the host only."""
        return self._parameter_copies is not None and self._parameter_copies.is_away

    def release(self) -> None:
        """Free what need not be copied: gradients, and parameters that are as they were when they left last."""
        if self._leaves_gradients:
            self.release_gradients()
        if self._parameter_copies is not None:
            self._parameter_copies.leave(self._parameters, only_if_unchanged=True)

    def release_gradients(self) -> None:
        """Free gradients until the next update, also where they are to stay."""
        if not self._gradients_away:
            for module in self._modules:
                module.offload_grad_buffers(synchronize=False, empty_cache=False)
            self._gradients_away = bool(self._modules)

    def offload(self) -> None:
        """Free that, and begin to move the rest to the host; pieces of it are free as soon as they are copied."""
        self.release()
        if self._state_copies is not None:
            self._state_copies.leave(self._optimizer_tensors())
        if self._parameter_copies is not None:
            self._parameter_copies.leave(self._parameters)

    def onload(self) -> None:
        """Begin to bring the parameters back."""
        if self._parameter_copies is not None:
            self._parameter_copies.arrive()

    def need_parameters(self) -> None:
        """Have them back for the computation given from now on."""
        if self._parameter_copies is not None:
            self._parameter_copies.arrive()
            self._parameter_copies.wait()

    def begin_update(self) -> None:
        """Have parameters and gradients, as zeros, back, and begin to bring the optimizer's state, which changes."""
        self.need_parameters()
        if self._gradients_away:
            for module in self._modules:
                module.restore_grad_buffers(synchronize=False)
            self._gradients_away = False
        for copies in self._copies():
            copies.arrive()
            copies.mark_changed()

    def need_optimizer(self) -> None:
        """Have its state back for the computation given from now on."""
        if self._state_copies is not None:
            self._state_copies.arrive()
            self._state_copies.wait()

    def _copies(self) -> list[HostCopies]:
        return [copies for copies in (self._parameter_copies, self._state_copies) if copies is not None]

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Moments and main copies. A float32 role's optimizer steps the model's parameters themselves: those stay."""
        device = self._parameters[0].device
        model = {parameter.untyped_storage()._cdata for parameter in self._parameters}
        for inner in (each.optimizer for each in chained_optimizers(self._optimizer) if each.optimizer is not None):
            tensors = chain(
                (value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)),
                (parameter for group in inner.param_groups for parameter in group["params"]),
            )
            yield from (
                item for item in tensors if item.device == device and item.untyped_storage()._cdata not in model
            )
