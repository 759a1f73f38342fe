"""Forming torch.distributed's default group from a rank's environment."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from mrl.launch.environment import RankEnvironment
from mrl.launch.store import connect_store


def init_process_group(
    env: RankEnvironment, *, backend: str, timeout: timedelta, store: dist.Store | None = None
) -> None:
    """Join the job's default process group. Called by all ranks.

    Args:
        store: this rank's client of the job's store; None makes one.
    """
    store = store or connect_store(env.master_addr, env.master_port, timeout=timeout)
    ranks = dist.PrefixStore(f"ranks/{env.attempt}", store)
    dist.init_process_group(backend, store=ranks, rank=env.rank, world_size=env.world_size, timeout=timeout)
