"""Device memory that can wait on the host: copied while other work runs, in few pieces, freed when its copy is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

_SLAB_BYTES = 2**28
_ARENA_BYTES = 2**30
_ALIGNMENT = 512


class Copier(Protocol):
    """Copies that run beside computation, in the order in which they are given."""

    def allocate_host(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in host memory that a device can copy from and to by itself."""
        ...

    def begin_out(self) -> None:
        """Have the copies to the host that are given from now on see all computation given so far."""
        ...

    def copy_out(self, host: Tensor, device: Tensor) -> None: ...

    def free(self, storage: torch.UntypedStorage) -> None:
        """Free a storage as soon as the copies out of it are done."""
        ...

    def end_out(self) -> Any:
        """What tells that the copies to the host given so far are done."""
        ...

    def begin_in(self, departed: Any) -> None:
        """Have the copies to the device that are given from now on follow `departed` and all computation so far."""
        ...

    def copy_in(self, device: Tensor, host: Tensor) -> None: ...

    def end_in(self) -> Any:
        """What tells that the copies to the device given so far are done."""
        ...

    def wait(self, arrived: Any) -> None:
        """Have the computation given from now on follow `arrived`."""
        ...


def build_copier(device: torch.device) -> Copier | None:
    """The device's copier; None for the CPU, whose memory is the host's."""
    return CudaCopier() if device.type == "cuda" else None


class CudaCopier:
    """Copies on two streams, one each way, that all roles of a process share: copies of a kind keep their order."""

    def __init__(self) -> None:
        self._out, self._in = _streams(torch.cuda.current_device())

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Pinned memory, which torch keeps for later use once it is dropped."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def begin_out(self) -> None:
        """As `Copier.begin_out`."""
        self._out.wait_stream(torch.cuda.current_stream())

    def copy_out(self, host: Tensor, device: Tensor) -> None:
        """As `Copier.copy_out`."""
        with torch.cuda.stream(self._out):
            host.copy_(device, non_blocking=True)

    def free(self, storage: torch.UntypedStorage) -> None:
        """The allocator hands the memory out again, or back to the device, after the copies so far; none waits here."""
        _bytes_of(storage).record_stream(self._out)
        storage.resize_(0)

    def end_out(self) -> torch.cuda.Event:
        """As `Copier.end_out`."""
        return self._out.record_event()

    def begin_in(self, departed: torch.cuda.Event | None) -> None:
        """As `Copier.begin_in`."""
        # The memory was allocated on the current stream, where its last user may still be at work.
        self._in.wait_stream(torch.cuda.current_stream())
        if departed is not None:
            self._in.wait_event(departed)

    def copy_in(self, device: Tensor, host: Tensor) -> None:
        """As `Copier.copy_in`."""
        with torch.cuda.stream(self._in):
            device.copy_(host, non_blocking=True)

    def end_in(self) -> torch.cuda.Event:
        """As `Copier.end_in`."""
        return self._in.record_event()

    def wait(self, arrived: torch.cuda.Event) -> None:
        """As `Copier.wait`."""
        torch.cuda.current_stream().wait_event(arrived)


@cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class HostSpace:
    """Host memory with addresses from 0 on. It grows and is kept.

    It consists of slabs whose sizes are powers of two: torch rounds pinned memory up to those, and nothing is lost.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._slabs: list[Tensor] = []
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Have at least `num_bytes`."""
        while self.num_bytes < num_bytes:
            missing = num_bytes - self.num_bytes
            slab = self._allocate(min(_SLAB_BYTES, 1 << (missing - 1).bit_length()))
            self._slabs.append(slab)
            self.num_bytes += slab.numel()

    def pieces(self, begin: int, num_bytes: int) -> Iterator[tuple[Tensor, int]]:
        """The memory from `begin` on, piece by piece, each with its distance from there."""
        end, base = begin + num_bytes, 0
        for slab in self._slabs:
            first, last = max(begin, base), min(end, base + slab.numel())
            if first < last:
                yield slab[first - base : last - base], first - begin
            base += slab.numel()


@dataclass(kw_only=True)
class _Arena:
    """One storage of the device and its place on the host."""

    storage: torch.UntypedStorage
    num_bytes: int
    host_offset: int
    members: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors packed into it and their offsets, in bytes; none where it is a storage that has views elsewhere."""
    is_packed: bool = True
    """Whether members lie in `storage` already."""


class HostCopies:
    """Tensors that wait on the host; they keep their identity and, once back, their values.

    Args:
        packs: have tensors that alone own their memory share few large storages from their first return on, so that
            later moves take few copies and allocations. Their memory moves then; their views elsewhere would not.
    """

    def __init__(self, copier: Copier, *, packs: bool) -> None:
        self._copier = copier
        self._packs = packs
        self._host = HostSpace(copier.allocate_host)
        self._arenas: list[_Arena] = []
        self.is_away = False
        """Whether they are on the host only."""
        self._changed = True
        self._departed: Any = None
        self._arrived: Any = None

    def mark_changed(self) -> None:
        """The values will change: what the host has is no copy of them any more."""
        self._changed = True

    def leave(self, tensors: Iterable[Tensor], *, only_if_unchanged: bool = False) -> None:
        """Begin to copy the tensors' memory to the host, piece by piece, each freed when its copy is done.

        Where the host has their values already nothing is copied. While they are away nothing may use them.

        Args:
            only_if_unchanged: do nothing if anything would have to be copied.
        """
        if self.is_away:
            return
        current = [tensor for tensor in tensors if tensor.untyped_storage().nbytes()]
        same = self._holds(current)
        if only_if_unchanged and (self._changed or not same):
            return
        self.wait()
        if not same:
            self._lay_out(current)
        if self._changed or not same:
            self._copier.begin_out()
            for arena in self._arenas:
                self._copy_out(arena)
            self._departed = self._copier.end_out()
        else:
            for arena in self._arenas:
                arena.storage.resize_(0)
        self.is_away, self._changed = True, False

    def arrive(self) -> None:
        """Begin to bring everything back; whoever uses it calls `wait` first."""
        if not self.is_away:
            return
        for arena in self._arenas:
            _allocate(arena)
        self._copier.begin_in(self._departed)
        for arena in self._arenas:
            device = _bytes_of(arena.storage)
            for host, offset in self._host.pieces(arena.host_offset, arena.num_bytes):
                self._copier.copy_in(device[offset : offset + host.numel()], host)
        self._arrived = self._copier.end_in()
        self.is_away = False

    def wait(self) -> None:
        """Have the computation given from now on follow the arrival."""
        if self._arrived is not None:
            self._copier.wait(self._arrived)
            self._arrived = None

    def _copy_out(self, arena: _Arena) -> None:
        if arena.is_packed:
            sources = [(_bytes_of(arena.storage), 0)]
        else:
            sources = [(_bytes_of(tensor.untyped_storage()), offset) for tensor, offset in arena.members]
        for device, start in sources:
            for host, offset in self._host.pieces(arena.host_offset + start, device.numel()):
                self._copier.copy_out(host, device[offset : offset + host.numel()])
            self._copier.free(device.untyped_storage())

    def _holds(self, tensors: list[Tensor]) -> bool:
        """Whether the arenas are those of these tensors, and each lies where it was put."""
        expected = {(id(tensor), arena.storage._cdata) for arena in self._arenas for tensor, _ in arena.members}
        fixed = {arena.storage._cdata for arena in self._arenas if not arena.members}
        found = {(id(tensor), tensor.untyped_storage()._cdata) for tensor in tensors}
        return expected == {each for each in found if each[1] not in fixed} and fixed <= {each[1] for each in found}

    def _lay_out(self, tensors: list[Tensor]) -> None:
        """Give everything a place on the host, and small tensors a common storage for their return."""
        by_storage: dict[int, dict[int, Tensor]] = {}
        for tensor in tensors:
            by_storage.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
        arenas: list[_Arena] = []
        end = 0
        for sharing in by_storage.values():
            tensor = next(iter(sharing.values()))
            storage = tensor.untyped_storage()
            if self._packs and len(sharing) == 1 and _owns(tensor):
                end = _pack(arenas, tensor, end)
            else:
                arenas.append(_Arena(storage=storage, num_bytes=storage.nbytes(), host_offset=end))
                end = _aligned(end + storage.nbytes())
        self._host.grow(end)
        self._arenas = arenas


def _pack(arenas: list[_Arena], tensor: Tensor, end: int) -> int:
    """Add the tensor to the last arena, or to a new one; returns the host's next free address."""
    size = tensor.untyped_storage().nbytes()
    last = arenas[-1] if arenas else None
    if last is None or last.is_packed or end - last.host_offset + size > _ARENA_BYTES:
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device).untyped_storage()
        last = _Arena(storage=empty, num_bytes=0, host_offset=end, is_packed=False)
        arenas.append(last)
    last.members.append((tensor, end - last.host_offset))
    last.num_bytes = end - last.host_offset + size
    return _aligned(end + size)


@torch.no_grad()
def _allocate(arena: _Arena) -> None:
    arena.storage.resize_(arena.num_bytes)
    if arena.is_packed:
        return
    for tensor, offset in arena.members:
        place = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        place.set_(arena.storage, offset // tensor.element_size(), tensor.shape, tensor.stride())
        tensor.data = place
    arena.is_packed = True


def _owns(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
