"""Threads of a rank's own work: what each rank can have, and that all take equally many."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from mrl.launch.cores import Seat, fair_threads, read_quota, take_share
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group


def ranks_of(host: str, cores: range, count: int, *, limit: float = float("inf")) -> list[Seat]:
    return [Seat(host=host, cores=frozenset(cores), limit=limit)] * count


def test_ranks_that_share_cores_have_the_same_part_of_them_less_what_engines_need():
    # 64 cores for 8 ranks are 8 for each, of which 2 are the engine's.
    assert fair_threads(ranks_of("a", range(64), 8)) == 6
    # Bound to cores of their own: 8 for each, too.
    assert fair_threads([seat for i in range(8) for seat in ranks_of("a", range(8 * i, 8 * i + 8), 1)]) == 6


def test_all_ranks_take_what_the_smallest_host_allows():
    assert fair_threads(ranks_of("a", range(64), 4) + ranks_of("b", range(32), 4)) == 6
    # Equal core numbers of two hosts are not the same cores.
    assert fair_threads(ranks_of("a", range(16), 1) + ranks_of("b", range(16), 1)) == 14


def test_there_is_always_a_thread_and_never_more_than_help():
    assert fair_threads(ranks_of("a", range(2), 8)) == 1
    assert fair_threads(ranks_of("a", range(256), 2)) == 16


def test_a_control_groups_quota_counts_like_cores():
    assert fair_threads(ranks_of("a", range(128), 2, limit=12.0)) == 4


@pytest.mark.parametrize(("content", "cores"), [("max 100000\n", float("inf")), ("150000 100000\n", 1.5)])
def test_quotas_are_read_as_the_kernel_writes_them(content: str, cores: float, tmp_path: Path):
    (tmp_path / "cpu.max").write_text(content)
    assert read_quota(tmp_path / "cpu.max") == cores
    assert read_quota(tmp_path / "absent") == float("inf")


def threads_of(env: RankEnvironment, requested: int | None, on_gpu: bool) -> int:
    init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    take_share(env.host_address, requested=requested, on_gpu=on_gpu)
    return torch.get_num_threads()


def test_a_request_acts_everywhere_and_without_one_ranks_on_a_cpu_keep_what_they_have():
    assert run_ranks(lambda env: threads_of(env, 3, False), 2) == [3, 3]
    assert run_ranks(lambda env: threads_of(env, None, False), 2) == [1, 1]


def test_ranks_on_gpus_agree_on_a_number_of_threads():
    first, second = run_ranks(lambda env: threads_of(env, None, True), 2)
    assert first == second >= 1
