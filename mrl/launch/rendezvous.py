"""Forming torch.distributed's default group from a rank's environment."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from mrl.launch.environment import RankEnvironment


def init_process_group(env: RankEnvironment, *, backend: str, timeout: timedelta) -> None:
    """Join the job's default process group. Called by all ranks.

    A locally forked rank 0 listens on the socket that its parent bound: a port that was only looked up could be taken
    before it is used.
    """
    if env.listen_fd is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    is_master = env.rank == 0
    store = dist.TCPStore(
        env.master_addr,
        env.master_port,
        env.world_size,
        is_master,
        timeout=timeout,
        master_listen_fd=env.listen_fd if is_master else None,
    )
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
