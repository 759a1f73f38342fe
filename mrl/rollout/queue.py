"""A queue of prompt indices that the ranks of a job share through a key-value store."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from mrl.parallel.agreement import broadcast_result


def open_store(timeout: timedelta) -> dist.Store:
    """A store that rank 0 serves. Called by all ranks."""
    if not dist.is_initialized():
        return dist.HashStore()
    server: list[dist.TCPStore] = []

    def serve() -> tuple[str, int]:
        host = _reachable_host()
        server.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout))
        return host, server[0].port

    host, port = broadcast_result(serve)
    return server[0] if server else dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout)


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


def _reachable_host() -> str:
    """The address under which the other ranks reach this one."""
    master = os.environ.get("MASTER_ADDR", "")
    return "127.0.0.1" if master in ("127.0.0.1", "localhost") else socket.gethostname()
