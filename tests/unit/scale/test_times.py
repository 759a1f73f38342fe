"""Times from sizes and rates."""

import pytest

from mrl.reshard.plan import PlanStats
from mrl.scale.times import Rates, bubble_fraction, predict_rank


def stats(*, local=0, same_host=0, remote=0, sent=0):
    return PlanStats(
        copies=1,
        fills=0,
        bytes=local + same_host + remote,
        fill_bytes=0,
        local_bytes=local,
        remote_bytes=remote,
        sent_bytes=sent,
        bytes_by_source={},
    )


RATES = Rates(device_copy=1000, nvlink=100, network=10)


def test_ways_are_busy_together_and_the_check_reads_everything_once_more():
    time = predict_rank(stats(local=3 * 10**9, same_host=10**9), RATES)
    # 3 ms and 10 ms at once; 4 GB at twice the rate of a copy.
    assert time.copy_s == pytest.approx(0.010)
    assert time.check_s == pytest.approx(0.002)
    assert time.total_s == pytest.approx(0.012)


def test_a_rank_that_sends_more_than_it_receives_waits_for_its_sends():
    assert predict_rank(stats(remote=10**9), RATES).copy_s == pytest.approx(0.1)
    assert predict_rank(stats(remote=10**9, sent=3 * 10**9), RATES).copy_s == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "expected"),
    [(1, None, 4, 0.0), (2, None, 1, 0.5), (4, None, 16, 3 / 19), (4, 2, 16, 3 / 35)],
)
def test_bubble_by_hand(pp, vpp, micro_batches, expected):
    assert bubble_fraction(pp=pp, vpp=vpp, num_microbatches=micro_batches) == pytest.approx(expected)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="--network-gb-s = 0 must be positive"):
        Rates(network=0)
