"""Exporting CUDA memory and opening it on the reader's own device, through raw CUDA IPC.

A handle stands for a whole allocation of the driver; the exported bytes lie at an offset in it, so parameters that
torch's allocator put into one segment share a handle. It is opened with the reader's device current: peer memory is
read through a mapping there, and no context is made on the peer.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, UntypedStorage

from mrl import ops
from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceBuffer

_mappings: dict[tuple[str, int], int] = {}
"""Address of an opened allocation by (its handle, own device index): the driver maps it once for a process."""


def export_cuda_storage(storage: UntypedStorage) -> SourceBuffer:
    """The handle of a CUDA storage; it stays where it is and must not be freed while a reader has it open.

    Raises:
        ValueError: the memory is not from cudaMalloc (expandable segments, torch_memory_saver, NCCL user buffers).
    """
    memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    try:
        handle, offset = ops.ipc_export(memory)
    except RuntimeError as error:
        raise ValueError(f"parameters on {memory.device} cannot be exported: {error}") from error
    text = f"cuda_ipc:{os.getpid()}:{offset}:{bytes(handle.tolist()).hex()}"
    return SourceBuffer(handle=text, num_bytes=storage.nbytes())


def open_cuda_buffer(buffer: SourceBuffer) -> Tensor:
    """The exported bytes on this process's current device. [num_bytes] uint8; the mapping is kept for the next call.

    Raises:
        ReshardError: the owner is gone or is this process, or its GPU is no peer of the current device.
    """
    _, pid, offset, handle = buffer.handle.split(":")
    device = torch.device("cuda", torch.cuda.current_device())
    key = handle, device.index
    if key not in _mappings:
        raw = torch.frombuffer(bytearray.fromhex(handle), dtype=torch.uint8)
        try:
            _mappings[key] = ops.ipc_open(raw, device)
        except RuntimeError as error:
            raise ReshardError(f"{buffer.num_bytes} bytes exported by process {pid}: {error}") from error
    return ops.tensor_from_ptr(_mappings[key] + int(offset), buffer.num_bytes, device)


def close_cuda_buffers() -> None:
    """Unmap all that `open_cuda_buffer` has opened; tensors it returned must not be used any more."""
    while _mappings:
        (_, index), address = _mappings.popitem()
        ops.ipc_close(address, torch.device("cuda", index))
