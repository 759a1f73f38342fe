"""The comparison of what readers got with what lies on the devices they read."""

import json

import pytest

from mrl.reshard.errors import ReshardError
from mrl.reshard.peer_sums import PeerSums, check_peer_sums


def sums(rank, arrived=(), served=()):
    return PeerSums(rank=rank, arrived=dict(arrived), served=dict(served))


def test_equal_sums_of_all_pairs_pass():
    check_peer_sums([sums(0, {1: 7}, {1: 8}), sums(1, {0: 8}, {0: 7, 2: 9}), sums(2, {1: 9})], whole_job=True)
    check_peer_sums([], whole_job=True)


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        (
            [sums(0, {1: 7}), sums(1, served={0: 255})],
            "engine rank 0 read .* of engine rank 1: .* arrived is 0x7, .* lies there 0xff; .* Pull again",
        ),
        ([sums(0, {1: 7}), sums(1)], "rank 0 read .* of engine rank 1: .* arrived is 0x7, .* lies there absent;"),
        ([sums(0), sums(1, served={0: 7})], "rank 0 read .* of engine rank 1: .* arrived is absent, .* there 0x7;"),
        ([sums(0, {1: 7})], "rank 0 read .* of engine rank 1: .* 0x7, .* lies there absent;"),
        ([sums(1, served={0: 7})], "rank 0 read .* of engine rank 1: .* absent, .* lies there 0x7;"),
        # A rank without the compiled ops sums nothing that another one could compare with.
        ([sums(0, {1: 7}), sums(1, served={0: None})], "arrived is 0x7, .* lies there not taken;"),
        ([sums(0, {1: None}), sums(1)], "arrived is not taken, .* lies there absent;"),
    ],
)
def test_pairs_that_do_not_agree_are_named_with_both_sums(reports, message):
    with pytest.raises(ReshardError, match=message):
        check_peer_sums(reports, whole_job=True)


def test_a_reader_that_compared_both_sides_itself_agrees_with_any_sum():
    check_peer_sums([sums(0, {1: None}), sums(1, served={0: 7})], whole_job=True)
    check_peer_sums([sums(0, {1: None}), sums(1, served={0: None})], whole_job=True)


def test_an_engine_alone_compares_only_pairs_of_its_own():
    check_peer_sums([sums(0, {1: 7, 4: 1}, {5: 2}), sums(1, served={0: 7})], whole_job=False)
    with pytest.raises(ReshardError, match=r"engine rank 0 read .* engine rank 1"):
        check_peer_sums([sums(0, {1: 7, 4: 1}), sums(1, served={0: 6})], whole_job=False)


def test_sums_travel_as_json():
    report = sums(3, {0: 2**64 - 1, 1: None}, {2: 5})
    assert PeerSums.from_json(json.loads(json.dumps(report.to_json()))) == report
