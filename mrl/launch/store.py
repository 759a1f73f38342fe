"""The job's key-value store: served by host 0 in a process of its own, so that it outlives any rank.

Its clients have no thread; a rank can use the store and still fork an engine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkProcess
from typing import TYPE_CHECKING

from mrl.launch.addresses import family_of, join_host_port
from mrl.launch.lifeline import die_with_parent

if TYPE_CHECKING:
    import torch.distributed as dist

_BACKLOG = 4096


@contextmanager
def serve_store(address: str, port: int = 0) -> Iterator[int]:
    """Serve a store at `address`, on `port` or any free one, and yield the port. It ends with the block, or with this
    process.

    Raises:
        ValueError: the port is taken, or the address is not this host's.
    """
    process: ForkProcess | None = None
    try:
        with _listen(address, port) as server:
            port = server.getsockname()[1]
            process = multiprocessing.get_context("fork").Process(
                target=_serve, args=(server, address, os.getpid()), name="store"
            )
            process.start()
        yield port
    finally:
        if process is not None:
            process.kill()
            process.join()


def connect_store(address: str, port: int, *, timeout: timedelta) -> dist.Store:
    """A client of the store; waits for the store to be there. `timeout` holds for each later call, too.

    Raises:
        ValueError: nothing answered in time.
    """
    # Imported here: a process that only forks ranks which need no store does without torch.
    import torch.distributed as dist

    try:
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(
            f"no answer from the job's store at {join_host_port(address, port)} within {timeout.total_seconds():.0f} "
            "s; is host 0 up, and does a firewall let this host reach that port?"
        ) from error


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), family=family_of(address), backlog=_BACKLOG)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {join_host_port(address, port)} for the job's store ({error}); set MASTER_PORT to a "
            "free port, or MRL_HOST_ADDRESS to an address of this host"
        ) from error


def _serve(server: socket.socket, address: str, parent: int) -> None:
    die_with_parent(parent)
    # Ctrl-C reaches the whole foreground group; whoever started this decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch.distributed as dist

    port = server.getsockname()[1]
    store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    signal.pause()
    del store
    os._exit(0)
