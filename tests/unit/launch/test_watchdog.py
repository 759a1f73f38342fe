"""Deadlines, reports of hangs and whose error is the run's, on forked ranks."""

import ctypes
import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from mrl.launch.addresses import LOOPBACK
from mrl.launch.board import Failure, PeerFailedError
from mrl.launch.environment import host_environments
from mrl.launch.fork import RankFailure, run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.launch.watchdog import HANG_STATUS, Deadlines, Patience, Watchdog


def watched(env, tmp_path, *, deadline_s=600.0, **patience):
    """A rank's watchdog that watches; the ranks have formed their process group."""
    watchdog = Watchdog(
        env,
        Deadlines(default_s=600.0, of_phase_s={"reward": deadline_s}),
        run_dir=tmp_path,
        patience=Patience(**patience),
    )
    init_process_group(env, backend="gloo", timeout=timedelta(seconds=300))
    watchdog.start()
    return watchdog


def sleep_in_here():
    time.sleep(200)


def report_of(tmp_path):
    [path] = tmp_path.glob("hang-*.txt")
    return path.read_text()


def test_a_missed_deadline_ends_all_ranks_with_one_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "reward/mean": 0.5}\n')

    def main(env):
        with watched(env, tmp_path, deadline_s=1.0 if env.rank == 1 else 600.0) as watchdog:
            watchdog.enter("reward")
            if env.rank == 1:
                sleep_in_here()
            dist.barrier()

    begin = time.monotonic()
    with pytest.raises(RankFailure, match=f"died with exit status {HANG_STATUS}"):
        run_ranks(main, 3)
    assert time.monotonic() - begin < 30
    report = report_of(tmp_path)
    assert "phase reward took longer than 1 s on rank 1" in report
    assert "rank 1 is not in a collective" in report
    assert "sleep_in_here: time.sleep(200)" in report
    assert "2 ranks (0, 2) are waiting in barrier, called by unit/launch/test_watchdog.py" in report
    assert 'last metrics: {"step": 2, "reward/mean": 0.5}' in report


def test_a_stopped_rank_is_named_and_does_not_stay(tmp_path):
    def main(env):
        with watched(env, tmp_path, deadline_s=1.0, gather_s=60.0) as watchdog:
            (tmp_path / f"pid{env.rank}").write_text(str(os.getpid()))
            watchdog.enter("reward")
            dist.barrier()
            if env.rank == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.barrier()

    begin = time.monotonic()
    with pytest.raises(RankFailure):
        run_ranks(main, 3)
    assert time.monotonic() - begin < 30
    pid = (tmp_path / "pid2").read_text()
    report = report_of(tmp_path)
    assert f"rank 2 is silent: process {pid} is stopped" in report
    assert "2 ranks (0, 1) are waiting in barrier" in report
    assert not os.path.exists(f"/proc/{pid}")


def test_a_rank_that_raises_is_the_cause_for_all(tmp_path):
    def main(env):
        try:
            with watched(env, tmp_path):
                if env.rank == 1:
                    # Its connections break before it has an error of its own.
                    try:
                        raise ValueError("batch size 3 does not divide 4")
                    finally:
                        time.sleep(0.2)
                dist.barrier()
        except PeerFailedError as error:
            return "peer", str(error)
        except ValueError as error:
            return "own", str(error)
        finally:
            dist.destroy_process_group()

    expected = ("peer", "rank 1: batch size 3 does not divide 4")
    assert run_ranks(main, 3) == [expected, ("own", "batch size 3 does not divide 4"), expected]


def test_a_rank_that_goes_on_without_a_failed_one_is_ended(tmp_path):
    def main(env):
        with watched(env, tmp_path, peer_s=0.5):
            if env.rank == 0:
                sleep_in_here()
            raise KeyError("gone")

    def other_host(env):
        # As on another host: the parent of rank 0 hears nothing of rank 1.
        if env.rank == 0:
            main(env)
        else:
            with pytest.raises(KeyError):
                main(env)

    with pytest.raises(RankFailure, match=f"rank 0 died with exit status {HANG_STATUS}"):
        run_ranks(other_host, 2)


def test_a_rank_stuck_in_c_code_ends_by_itself(tmp_path, capfd):
    def main(env):
        with watched(env, tmp_path, deadline_s=0.5, stuck_s=0.5) as watchdog:
            watchdog.enter("reward")
            # With Python's lock held: no Python thread of this process runs any more.
            ctypes.PyDLL(None).sleep(200)

    with pytest.raises(RankFailure, match="died with exit status 1"):
        run_ranks(main, 1)
    assert "Timeout" in capfd.readouterr().err


def test_time_in_a_phase_starts_with_it(tmp_path):
    [env] = host_environments(num_nodes=1, ranks_per_node=1, master_addr=LOOPBACK, master_port=1)
    watchdog = Watchdog(env, Deadlines(default_s=600.0, of_phase_s={"reward": 60.0}), run_dir=tmp_path)
    watchdog.enter("reward")
    watchdog._since -= 61
    assert watchdog._late() == Failure(rank=0, kind="hang", message="phase reward took longer than 60 s")
    for phase in ("loop", "reward"):
        watchdog.enter(phase)
        assert watchdog._late() is None
    watchdog.enter("rollout")
    watchdog._since -= 61
    assert watchdog._late() is None
