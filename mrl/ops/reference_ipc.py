"""CUDA IPC through the libraries that torch has loaded, for hosts where the extension cannot be compiled."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t; passed by value."""

    _fields_ = [("bytes", ctypes.c_uint8 * HANDLE_BYTES)]


def ipc_export(memory: Tensor) -> tuple[Tensor, int]:
    """See `mrl.ops.cuda_ipc.ipc_export`."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    pointer = ctypes.c_uint64(memory.data_ptr())
    error = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), pointer)
    if error:
        raise RuntimeError(f"no CUDA allocation at {pointer.value:#x} on {memory.device}: CUDA driver error {error}")
    handle = _Handle()
    with torch.cuda.device(memory.device):
        error = _runtime().cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(base.value))
    _check(error, "cannot export memory; CUDA IPC handles exist for cudaMalloc memory only (no expandable segments)")
    return torch.frombuffer(bytearray(handle.bytes), dtype=torch.uint8), pointer.value - base.value


def ipc_open(handle: Tensor, device: torch.device) -> int:
    """See `mrl.ops.cuda_ipc.ipc_open`."""
    raw = _Handle.from_buffer_copy(bytes(handle.tolist()))
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        error = _runtime().cudaIpcOpenMemHandle(ctypes.byref(pointer), raw, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
    _check(error, f"cannot open exported memory on {device}; the exporter must be alive and another process")
    return int(pointer.value or 0)


def ipc_close(pointer: int, device: torch.device) -> None:
    """See `mrl.ops.cuda_ipc.ipc_close`."""
    with torch.cuda.device(device):
        _check(_runtime().cudaIpcCloseMemHandle(ctypes.c_void_p(pointer)), f"cannot close address {pointer:#x}")


@functools.cache
def _runtime() -> ctypes.CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    return ctypes.CDLL(f"libcudart.so.{major}")


def _check(error: int, what: str) -> None:
    if error:
        _runtime().cudaGetLastError()
        raise RuntimeError(f"{what}: CUDA error {error}")
