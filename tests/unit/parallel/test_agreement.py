"""Every rank gets the result, or the same error."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.agreement import broadcast_result, gather_results


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("holds a lambda")
        self.function = lambda: None


def _raise(error):
    raise error


def _attempt(function):
    try:
        return function()
    except Exception as error:
        return type(error).__name__, str(error)


def on_ranks(function, world_size=3):
    def main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        try:
            return function(env)
        finally:
            dist.destroy_process_group()

    return run_ranks(main, world_size, timeout_s=60)


def test_results_and_errors_reach_every_rank():
    def main(env):
        rank = env.rank
        return [
            broadcast_result(lambda: f"from {rank}", source_rank=1),
            gather_results(lambda: rank * rank),
            _attempt(lambda: broadcast_result(lambda: _raise(ValueError(f"rank {rank}")), source_rank=2)),
            _attempt(lambda: gather_results(lambda: _raise(KeyError(rank)) if rank else rank)),
            _attempt(lambda: broadcast_result(lambda: _raise(Unpicklable()))),
        ]

    expected = [
        "from 1",
        [0, 1, 4],
        ("ValueError", "rank 2"),
        ("KeyError", "1"),
        ("RuntimeError", "Unpicklable: holds a lambda"),
    ]
    assert on_ranks(main) == [expected] * 3


def test_one_process_needs_no_group():
    assert broadcast_result(lambda: 3) == 3
    assert gather_results(lambda: 3) == [3]
    with pytest.raises(ValueError, match="plain"):
        gather_results(lambda: _raise(ValueError("plain")))
