"""What an engine makes of its ranks' statuses after an update."""

import pytest

from mrl.backends.sglang.status import check_own_pairs, report_of
from mrl.interfaces import EngineError
from mrl.reshard.peer_sums import PeerSums


def status(rank, arrived=(), served=(), seconds=0.5):
    counts = {"bytes": 100, "local_bytes": 60, "remote_bytes": 10, "aliased_bytes": 5, "ops": 3}
    sums = PeerSums(rank=rank, arrived=dict(arrived), served=dict(served))
    return {**counts, "seconds": seconds, "peer_sums": sums.to_json()}


def test_a_report_adds_up_its_ranks_and_keeps_their_sums():
    report = report_of([status(2, {3: 7}), status(3, served={2: 7}, seconds=0.75)], weight_version=4, call_s=0.9)
    assert (report.bytes, report.local_bytes, report.remote_bytes) == (200, 120, 20)
    assert (report.aliased_bytes, report.ops, report.pull_s, report.weight_version) == (10, 6, 0.75, 4)
    assert [(each.rank, each.arrived, each.served) for each in report.peer_sums] == [(2, {3: 7}, {}), (3, {}, {2: 7})]


def test_an_engine_refuses_what_its_own_ranks_did_not_get_whole():
    check_own_pairs([status(2, {3: 7, 0: 1}), status(3, served={2: 7})])
    with pytest.raises(EngineError, match=r"engine rank 2 read weights from the device of engine rank 3"):
        check_own_pairs([status(2, {3: 7, 0: 1}), status(3, served={2: 8})])
