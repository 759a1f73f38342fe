"""Which rank is slow, from seconds that each reports."""

import logging
from datetime import timedelta

import pytest
import torch.distributed as dist

from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.observability.speed import SpeedWatch, time_matmul

# Seconds by rank, step by step: rank 2 is slow from the second step on, rank 1 once.
SECONDS = [[1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 2.0, 1.0], [1.0, 1.0, 2.0, 1.0], [1.0, 1.0, 2.5, 1.0], [1.0, 1.0, 2.0, 1.0]]


def test_a_rank_that_stays_slow_is_named_once_on_rank_0():
    def main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=100))
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger("mrl.observability.speed").addHandler(handler)
        steps = iter(SECONDS)
        watch = SpeedWatch(lambda: next(steps)[env.rank])
        ratios = [watch()["time/slowest_rank_ratio"] for _ in SECONDS]
        dist.destroy_process_group()
        return ratios, messages

    outcomes = run_ranks(main, 4, timeout_s=100)
    assert [ratios for ratios, _ in outcomes] == [[1.0, 3.0, 2.0, 2.5, 2.0]] * 4
    [message] = outcomes[0][1]
    assert message.startswith("rank 2 on host")
    assert "2.5 times slower" in message
    assert all(messages == [] for _, messages in outcomes[1:])


def test_the_median_of_two_is_the_faster():
    def main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=100))
        return SpeedWatch(lambda: 1.0 + 3.0 * env.rank)()["time/slowest_rank_ratio"]

    assert run_ranks(main, 2, timeout_s=100) == [4.0, 4.0]


def test_a_single_rank_is_as_fast_as_itself():
    assert SpeedWatch(lambda: 0.25)() == {"time/slowest_rank_ratio": 1.0}


def test_the_measured_work_takes_time():
    assert 0 < time_matmul("cpu") < 1


@pytest.mark.parametrize("ratio", [1.4, 1.6])
def test_a_little_slower_is_not_slow(ratio):
    watch = SpeedWatch(lambda: 1.0)
    assert [watch._still_slow([1.0, 1.0, ratio], 1.0) for _ in range(3)][-1] == ([2] if ratio > 1.5 else [])
