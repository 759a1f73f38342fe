"""Raw CUDA IPC: one handle for a whole allocation, opened in the importer's own context only.

torch's own sharing opens a handle in a context on the producer's GPU (memory on every peer, for every process) and
counts references per message. Here the importer reads peer memory through a mapping on its own device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrl.ops.extension import backend


def ipc_export(memory: Tensor) -> tuple[Tensor, int]:
    """Handle of the CUDA allocation under `memory`, [64] uint8 on CPU, and the byte of it at which `memory` starts.

    The allocation must outlive every importer's mapping. torch's allocator places several tensors in one allocation:
    one handle opens all of them.

    Raises:
        RuntimeError: not CUDA memory, or mapped (VMM) memory, which has no such handle: expandable segments,
            torch_memory_saver regions, NCCL user buffers.
    """
    return backend().ipc_export(memory)


def ipc_open(handle: Tensor, device: torch.device) -> int:
    """Address on `device` of the first byte of another process's allocation; close it with `ipc_close`.

    `device` is this process's own; access to the peer's memory is enabled for it.

    Raises:
        RuntimeError: the exporter died, is this process, or its GPU is no peer of `device`.
    """
    return backend().ipc_open(handle, device)


def ipc_close(pointer: int, device: torch.device) -> None:
    """Unmap what `ipc_open` returned for `device`; no kernel may still use it."""
    backend().ipc_close(pointer, device)


def tensor_from_ptr(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    """A [num_bytes] uint8 view of raw memory that is readable on `device`; it neither owns nor keeps the memory."""
    return backend().tensor_from_ptr(pointer, num_bytes, device)
