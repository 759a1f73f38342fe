"""Every rank gets the result, or the same error."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.agreement import broadcast_result, gather_results, require_equal, share_out


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


@pytest.mark.parametrize("count", [0, 2, 7])
def test_shares_are_joined_in_the_items_order_on_the_ranks_that_get_them(count):
    items = list(range(10, 10 + count))

    def main(env):
        def work(share):
            return [(env.rank, item) for item in share]

        def fail(share):
            return _raise(ValueError(f"rank {env.rank}")) if env.rank else work(share)

        return [
            share_out(work, items),
            share_out(work, items, only_to=1),
            _attempt(lambda: share_out(fail, items)),
            _attempt(lambda: share_out(fail, items, only_to=2)),
        ]

    joined = [(place % 3, item) for place, item in enumerate(items)]
    error = ("ValueError", "rank 1")
    assert on_ranks(main) == [[joined, joined if rank == 1 else [], error, error] for rank in range(3)]


def test_alone_a_process_computes_everything():
    assert share_out(lambda share: [item + 1 for item in share], [1, 2, 3], only_to=0) == [2, 3, 4]


def test_ranks_that_differ_are_named_with_their_values_everywhere():
    def main(env):
        value = "step 4" if env.rank < 2 else "none"
        found = _attempt(lambda: require_equal(value, place=f"host {env.rank // 2}", message="share the folder"))
        return found, _attempt(lambda: require_equal("same", place=f"host {env.rank}", message="share the folder"))

    error = ("ValueError", "share the folder: step 4 on host 0; none on host 1")
    assert on_ranks(main) == [(error, None)] * 3
