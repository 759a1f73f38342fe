"""Runs a function on forked ranks of the preloaded test process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group


def run_on_ranks(
    function: Callable[[], Any], world_size: int, *, timeout_s: float = 280.0, on_gpus: bool = False
) -> list[Any]:
    """What `function` returns on each of `world_size` ranks, in rank order.

    The first failing rank's own error is raised here, as RankFailure; no process outlives the call.

    Args:
        on_gpus: give every rank a GPU; the test process itself must not have touched one.
    """

    def rank_main(env: RankEnvironment) -> bytes:
        torch.set_num_threads(1)
        if on_gpus:
            torch.cuda.set_device(env.local_rank)
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        init_process_group(env, backend=backend, timeout=timedelta(seconds=timeout_s))
        # Plain pickle: multiprocessing's would share tensors through this process, which is about to end.
        return pickle.dumps(function())

    return [pickle.loads(result) for result in run_ranks(rank_main, world_size, timeout_s=timeout_s)]
