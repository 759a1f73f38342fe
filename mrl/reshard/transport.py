"""Exporting a trainer's parameter memory and opening it in an engine process.

A handle is a string "<scheme>:<rest>"; each scheme has one opener. On CPU a storage is moved, in place, into an
anonymous shared mapping: every tensor on it follows, nothing has a name in a file system, and the kernel frees it with
the last process that maps it, however that process ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage

from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceBuffer, SourceParam, SourceRank

_SHM = "shm"


def export_storage(memory: Tensor | UntypedStorage) -> SourceBuffer:
    """Move a CPU storage into shared memory and return its handle; a second call returns the same one.

    All tensors on the storage see the move; raw pointers taken before it (numpy views, `data_ptr()`) are stale.
    The handle is valid while the storage lives. Children forked later inherit the memory.

    Raises:
        ValueError: the storage is empty or not on the CPU.
    """
    storage = memory.untyped_storage() if isinstance(memory, Tensor) else memory
    if storage.device.type != "cpu":
        raise ValueError(f"no transport exports memory on {storage.device}; only CPU storages can be shared")
    if storage.nbytes() == 0:
        raise ValueError("cannot export an empty storage; export after the parameters are allocated")
    # Not share_memory_(): it may use named files in /dev/shm, which stay after a kill. This file is already unlinked.
    descriptor, num_bytes = storage._share_fd_cpu_()[:2]
    inode = os.fstat(descriptor).st_ino
    return SourceBuffer(handle=f"{_SHM}:{os.getpid()}:{descriptor}:{inode}", num_bytes=num_bytes)


def open_buffer(buffer: SourceBuffer) -> Tensor:
    """The exported bytes as a tensor that shares the owner's memory. [num_bytes] uint8; only read it.

    Raises:
        ReshardError: the owner died or freed the memory, this process may not open it, or the scheme is unknown.
    """
    scheme = buffer.handle.partition(":")[0]
    if scheme not in _OPENERS:
        raise ReshardError(f"buffer handle {buffer.handle!r} has an unknown scheme; known: {', '.join(_OPENERS)}")
    return _OPENERS[scheme](buffer)


def export_source(
    named_parameters: Iterable[tuple[str, Tensor]], *, rank: int, tp_rank: int, tp_size: int, host: str, device: int
) -> SourceRank:
    """Export the storages under a trainer rank's parameters, each storage once.

    Each storage costs one file descriptor: keep parameters in a few flat buffers.

    Args:
        named_parameters: Megatron's names with global layer numbers, and contiguous tensors of one dtype.

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


_OPENERS: dict[str, Callable[[SourceBuffer], Tensor]] = {_SHM: _open_shared_memory}
