"""A role's checkpoint between its copy in memory and its files: planned by megatron-core, written here.

Megatron's own writers report an error by its type only, need a process of their own, and have rank 0 raise alone where
it cannot write the metadata. Everything that can fail here is local to a rank, so that the caller can agree on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mrl.interfaces import CheckpointError
from mrl.parallel.agreement import broadcast_result

# Asked for while a save is planned. Megatron's queue lives in a process that it spawns for it, which imports __main__
# again; nothing is sent through it here.
setattr(filesystem_async, "get_write_results_queue", lambda mp_mode="spawn": Queue())  # noqa: B010


class PlanOnly(TorchDistSaveShardedStrategy):
    """Plans a save as megatron-core does, and keeps the plan instead of handing out a function that writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.writer: Any = None
        """Knows this rank's files and their contents."""
        self.metadata: Any = None
        """What all ranks' files hold together; on rank 0."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.metadata, _ = save_state_dict_ret
        return AsyncRequest(async_fn=None, async_fn_args=(), finalize_fns=[])


class HostBuffer:
    """Host memory, pinned if there is CUDA, for copies of tensors; it grows to the largest save and is kept."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors on the host, after all copies are done; what an earlier call returned is overwritten."""
        offsets, size = [], 0
        for tensor in tensors:
            offsets.append(size)
            # Views of every dtype have to begin at a multiple of their element's size.
            size += -(-tensor.nbytes // 16) * 16
        if self._buffer.numel() < size:
            # First the old memory goes, then the new one comes.
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            target = self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(target.copy_(tensor, non_blocking=True))
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return copies


class StagedCheckpoint:
    """One rank's part of a role's checkpoint, ready to be written; see `mrl.interfaces.CheckpointWrite`."""

    def __init__(self, folder: Path, plan: PlanOnly) -> None:
        self._folder = folder
        self._plan = plan
        self._buckets, plan.writer.write_buckets = list(plan.writer.write_buckets), None
        self._results: list[WriteResult] = []

    def detach(self, live_storages: set[int], host: HostBuffer) -> None:
        """Copy whatever training would change to host memory: device tensors, and host tensors in `live_storages`."""
        tensors = [tensor for _, _, (_, items) in self._buckets for _, tensor in items]
        on_device = iter(host.copy([tensor for tensor in tensors if not tensor.is_cpu]))

        def detached(tensor: Tensor) -> Tensor:
            if not tensor.is_cpu:
                return next(on_device)
            return tensor.clone() if tensor.untyped_storage().data_ptr() in live_storages else tensor

        self._buckets = [
            (path, key, (objects, [(item, detached(tensor)) for item, tensor in items]))
            for path, key, (objects, items) in self._buckets
        ]

    def write(self) -> list[Path]:
        """Write this rank's files and force them to the disk; returns their paths. In any thread, no collective.

        Raises:
            CheckpointError: the system refused; with its message.
        """
        paths = []
        for name, key, (objects, tensors) in self._buckets:
            path = Path(name)
            self._results += _write_file(path, key, [*objects, *tensors])
            paths.append(path)
        self._buckets = []
        return paths

    def finish(self) -> None:
        """Write what describes all ranks' files together. Called by all ranks, when `write` is done on all of them.

        Raises:
            CheckpointError: the system refused; on all ranks.
        """
        results: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        # One entry for each tensor of each rank: nobody else needs them.
        dist.gather_object(self._results, results, dst=0)
        broadcast_result(lambda: self._write_metadata(results or []))

    def _write_metadata(self, results: list[list[WriteResult]]) -> None:
        plan = self._plan
        try:
            plan.writer.finish(plan.metadata, results)
            save_config(CheckpointingConfig(plan.backend, plan.version), str(self._folder))
        except OSError as error:
            raise _failed(self._folder, error) from error


class _Stream:
    """A file that swallows errors and remembers the first one.

    `torch.save` into a file on a full disk loses the system's error in its C++ writer, and has crashed in there.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._position += len(view)
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += os.write(self._descriptor, view[done:])
            except OSError as error:
                # Not the error itself: its frames would keep views of memory that is gone by then.
                self.error = OSError(error.errno, error.strerror)
        return len(view)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None: ...


def _write_file(path: Path, storage_key: str, items: Iterable[tuple[WriteItem, Any]]) -> list[WriteResult]:
    """Write one file and force it to the disk; where each item lies in it."""
    results = []
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            stream = _Stream(descriptor)
            for item, data in items:
                contents = _compact(data) if isinstance(data, Tensor) else data
                results.append(_write_item_to(stream, contents, item, storage_key))
                if stream.error is not None:
                    raise stream.error
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failed(path, error) from error
    return results


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the host without the rest of its storage, all of which `torch.save` would write."""
    host = tensor.cpu()
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()


def _write_item_to(stream: _Stream, data: Any, item: WriteItem, storage_key: str) -> WriteResult:
    return _write_item(
        _StorageWriterTransforms(),
        stream,  # type: ignore[arg-type]
        data,
        item,
        storage_key,
        serialization_format=SerializationFormat.TORCH_SAVE,
    )


def _failed(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write the checkpoint {path}: rank {dist.get_rank()}: {error}")
