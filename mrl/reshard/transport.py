"""Exporting a trainer's parameter memory and opening it in an engine process.

A handle is a string "<scheme>:<rest>"; each scheme has one opener. On CPU a storage is moved, in place, into an
anonymous shared mapping: every tensor on it follows, nothing has a name in a file system, and the kernel frees it with
the last process that maps it, however that process ends. CUDA memory stays where it is; see `cuda_transport`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from mrl.reshard.cuda_transport import close_cuda_buffers, export_cuda_storage, open_cuda_buffer
from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceBuffer, SourceParam, SourceRank

_SHM = "shm"
_CUDA_IPC = "cuda_ipc"


def export_storage(memory: Tensor | UntypedStorage) -> SourceBuffer:
    """The handle under which other processes open a storage; a second call returns the same one.

    A CPU storage is moved into shared memory. All tensors on it see the move; raw pointers taken before it (numpy
    views, `data_ptr()`) are stale. Children forked later inherit the memory. The handle is valid while the storage
    lives; CUDA memory must not be freed before its readers have closed it.

    Raises:
        ValueError: the storage is empty, on neither CPU nor CUDA, or CUDA memory that has no handle.
    """
    storage = memory.untyped_storage() if isinstance(memory, Tensor) else memory
    if storage.nbytes() == 0:
        raise ValueError("cannot export an empty storage; export after the parameters are allocated")
    if storage.device.type == "cuda":
        return export_cuda_storage(storage)
    if storage.device.type != "cpu":
        raise ValueError(f"no transport exports memory on {storage.device}; only CPU and CUDA storages can be shared")
    # Not share_memory_(): it may use named files in /dev/shm, which stay after a kill. This file is already unlinked.
    descriptor, num_bytes = storage._share_fd_cpu_()[:2]
    inode = os.fstat(descriptor).st_ino
    return SourceBuffer(handle=f"{_SHM}:{os.getpid()}:{descriptor}:{inode}", num_bytes=num_bytes)


def open_buffer(buffer: SourceBuffer) -> Tensor:
    """The exported bytes as a tensor that shares the owner's memory. [num_bytes] uint8; only read it.

    CUDA memory, a peer's too, is opened on this process's current device, once for the process.

    Raises:
        ReshardError: the owner died or freed the memory, this process may not open it, or the scheme is unknown.
    """
    scheme = buffer.handle.partition(":")[0]
    if scheme not in _OPENERS:
        raise ReshardError(f"buffer handle {buffer.handle!r} has an unknown scheme; known: {', '.join(_OPENERS)}")
    return _OPENERS[scheme](buffer)


def close_buffers() -> None:
    """Unmap the CUDA memory that this process has opened; tensors on it must not be used any more.

    Shared CPU memory is unmapped with its last tensor.
    """
    close_cuda_buffers()


def device_number(device: torch.device) -> int:
    """A number for a GPU that is the same in every process of its host, whatever it may see; -1 for the CPU."""
    if device.type != "cuda":
        return -1
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.pci_domain_id << 16 | properties.pci_bus_id << 8 | properties.pci_device_id


def export_source(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    rank: int,
    tp_rank: int,
    tp_size: int,
    etp_rank: int = 0,
    etp_size: int = 1,
    host: str,
    device: int,
) -> SourceRank:
    """Export the storages under a trainer rank's parameters, each storage once.

    Each storage costs one handle (on CPU a file descriptor): keep parameters in a few flat buffers.

    Args:
        named_parameters: Megatron's names with global layer numbers, and contiguous tensors of one dtype.
        device: `device_number` of theirs.

    Raises:
        ValueError: no parameters, several dtypes, or a parameter that is not contiguous.
    """
    buffers: list[SourceBuffer] = []
    index_of: dict[int, int] = {}
    params: list[SourceParam] = []
    dtypes: set[str] = set()
    for name, tensor in named_parameters:
        if not tensor.is_contiguous():
            raise ValueError(f"parameter {name} has strides {tensor.stride()}; only contiguous parameters are exported")
        storage = tensor.untyped_storage()
        if storage._cdata not in index_of:
            index_of[storage._cdata] = len(buffers)
            buffers.append(export_storage(storage))
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        offset = int(tensor.storage_offset()) * tensor.element_size()
        buffer = index_of[storage._cdata]
        params.append(SourceParam(name=name, shape=tuple(tensor.shape), buffer=buffer, offset_bytes=offset))
    if len(dtypes) != 1:
        raise ValueError(f"rank {rank} exports parameters of dtypes {sorted(dtypes)}; exactly one is needed")
    return SourceRank(
        rank=rank,
        tp_rank=tp_rank,
        tp_size=tp_size,
        etp_rank=etp_rank,
        etp_size=etp_size,
        host=host,
        device=device,
        dtype=dtypes.pop(),
        buffers=tuple(buffers),
        params=tuple(params),
    )


def _open_shared_memory(buffer: SourceBuffer) -> Tensor:
    _, pid, descriptor, inode = buffer.handle.split(":")
    path = Path(f"/proc/{pid}/fd/{descriptor}")
    gone = f"shared memory {buffer.handle} is gone: its owner, process {pid}, freed it or died"
    try:
        found = path.stat()
        # A process id or descriptor may have been given away again since the export.
        if found.st_ino != int(inode) or found.st_size < buffer.num_bytes:
            raise ReshardError(gone)
        return torch.from_file(str(path), shared=True, size=buffer.num_bytes, dtype=torch.uint8)
    except FileNotFoundError as error:
        raise ReshardError(gone) from error
    except PermissionError as error:
        raise ReshardError(
            f"process {os.getpid()} may not open {path}; run trainer and engine as the same user, in one container"
        ) from error


def _open_cuda(buffer: SourceBuffer) -> Tensor:
    if not torch.cuda.is_available():
        raise ReshardError(
            f"the trainer's weights are CUDA memory ({buffer.handle[:40]}...), but this process has no GPU"
        )
    return open_cuda_buffer(buffer)


_OPENERS: dict[str, Callable[[SourceBuffer], Tensor]] = {_SHM: _open_shared_memory, _CUDA_IPC: _open_cuda}
