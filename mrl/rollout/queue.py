"""A queue of prompt indices that the ranks of a job share through a key-value store."""

from __future__ import annotations

import uuid

import torch.distributed as dist

from mrl.parallel.agreement import broadcast_result


def open_store() -> dist.Store:
    """The store of this job's ranks, under a prefix nobody else uses. Called by all ranks."""
    if not dist.is_initialized():
        return dist.HashStore()
    prefix = broadcast_result(lambda: uuid.uuid4().hex)
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())


def job_store() -> dist.TCPStore:
    """This rank's client of the store that torch.distributed met through, without any prefix."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore), f"the job's store is a {type(store).__name__}"
    return store


class SharedQueue:
    """Hands out the indices 0 .. size - 1, each once, to whichever rank asks first."""

    def __init__(self, store: dist.Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size

    def take(self, count: int) -> range:
        """The next `count` indices, or as many as are left."""
        end = self._store.add(self._name, count)
        return range(min(end - count, self._size), min(end, self._size))

    def close(self) -> None:
        """Leave nothing for other ranks to take."""
        self._store.add(self._name, self._size)
