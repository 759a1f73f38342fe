"""Giving a role's device memory back while others work, and taking it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


@dataclass(kw_only=True, frozen=True)
class OffloadSettings:
    """What leaves the device between a role's uses. On CPU nothing does."""

    parameters: bool = False
    """To pinned host memory. Not for a role whose weights are exported: engines read them in place."""
    gradients: bool = False
    """Released: they are zero between updates."""
    optimizer: bool = False
    """Main copies and moments, to pinned host memory."""


class HostCopies:
    """Storages that wait in pinned host memory; tensors keep their identity and, once back, their values.

    Host memory is allocated once and kept.
    """

    def __init__(self) -> None:
        self._host: dict[int, Tensor] = {}
        self._away: list[torch.UntypedStorage] = []

    def offload(self, tensors: Iterable[Tensor]) -> int:
        """Copy the CUDA storages of `tensors` to the host and free them; returns their bytes."""
        storages = {item.untyped_storage()._cdata: item.untyped_storage() for item in tensors if item.is_cuda}
        leaving = [storage for storage in storages.values() if storage.nbytes()]
        for storage in leaving:
            host = self._host.get(storage._cdata)
            if host is None or host.numel() != storage.nbytes():
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                self._host[storage._cdata] = host
            host.copy_(_bytes_of(storage), non_blocking=True)
        num_bytes = sum(storage.nbytes() for storage in leaving)
        torch.cuda.synchronize()
        for storage in leaving:
            storage.resize_(0)
        self._away += leaving
        return num_bytes

    def restore(self) -> None:
        """Take everything back; the copies run on the current stream."""
        for storage in self._away:
            host = self._host[storage._cdata]
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        self._away = []


class RoleOffload:
    """Offload of one role's parameters, gradients and optimizer state, as configured."""

    def __init__(
        self,
        settings: OffloadSettings,
        *,
        parameters: list[torch.nn.Parameter],
        modules: list[DistributedDataParallel],
        optimizer: Any,
    ) -> None:
        self._settings = settings
        self._parameters = parameters
        self._modules = modules
        self._optimizer = optimizer
        self._copies = HostCopies()
        self._gradients_away = False

    def offload(self) -> None:
        """Give back what the settings name, and torch's cached blocks; waits for the device."""
        torch.cuda.synchronize()
        settings = self._settings
        if settings.gradients:
            for module in self._modules:
                module.offload_grad_buffers(synchronize=False, empty_cache=False)
            self._gradients_away = True
        leaving: Iterator[Tensor] = iter(())
        if settings.optimizer and self._optimizer is not None:
            leaving = chain(leaving, self._optimizer_tensors())
        if settings.parameters:
            leaving = chain(leaving, self._parameters)
        self._copies.offload(leaving)
        torch.cuda.empty_cache()

    def onload(self) -> None:
        """Take it all back, gradients as zeros."""
        self._copies.restore()
        if self._gradients_away:
            for module in self._modules:
                module.restore_grad_buffers(synchronize=False)
            self._gradients_away = False
        torch.cuda.synchronize()

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Moments and main copies. A float32 role's optimizer steps the model's parameters themselves: those stay."""
        model = {parameter.untyped_storage()._cdata for parameter in self._parameters}
        for inner in _inner_optimizers(self._optimizer):
            tensors = chain(
                (value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)),
                (parameter for group in inner.param_groups for parameter in group["params"]),
            )
            yield from (item for item in tensors if item.untyped_storage()._cdata not in model)


def _inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if each.optimizer is not None]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
