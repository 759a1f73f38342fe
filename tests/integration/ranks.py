"""Runs a function on forked gloo ranks of the preloaded test process."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks


def run_on_ranks(function: Callable[[], Any], world_size: int, *, timeout_s: float = 90.0) -> list[Any]:
    """What `function` returns on each of `world_size` gloo ranks, in rank order.

    The first failing rank's own error is raised here, as RankFailure; no process outlives the call.
    """
    # Rank 0 inherits the listening socket: a port that was only looked up could be taken before it listens.
    with socket.create_server(("127.0.0.1", 0), backlog=world_size) as server:

        def rank_main(env: RankEnvironment) -> bytes:
            torch.set_num_threads(1)
            _init_process_group(env, server, timedelta(seconds=timeout_s))
            # Plain pickle: multiprocessing's would share tensors through this process, which is about to end.
            return pickle.dumps(function())

        return [pickle.loads(result) for result in run_ranks(rank_main, world_size, timeout_s=timeout_s)]


def _init_process_group(env: RankEnvironment, server: socket.socket, timeout: timedelta) -> None:
    host, port = server.getsockname()[:2]
    is_master = env.rank == 0
    store = dist.TCPStore(
        host,
        port,
        env.world_size,
        is_master,
        timeout=timeout,
        master_listen_fd=server.detach() if is_master else None,
    )
    dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
