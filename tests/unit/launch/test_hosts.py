"""Tasks of one machine that meet over a store, as those of several hosts do."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest

from mrl.launch.addresses import find_host_address, interface_of, join_host_port, socket_variables
from mrl.launch.fork import run_ranks
from mrl.launch.hosts import join_job
from mrl.launch.store import connect_store, serve_store
from mrl.launch.task import Task

TIMEOUT = timedelta(seconds=60)


def task(index, port, **kwargs):
    return Task(
        index=index,
        count=2,
        local_index=0,
        node_rank=index,
        master_addr="127.0.0.1",
        master_port=port,
        host_address="127.0.0.1",
        **kwargs,
    )


@contextmanager
def reserved_port():
    """A port that nobody else gets, and on which nothing listens yet."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def meet(env, port):
    """One of two hosts of two ranks each; the same port of an agent's store in every attempt."""
    with join_job(
        task(env.rank, port, agent_store=True), num_nodes=2, ranks_per_node=2, interface=None, timeout=TIMEOUT
    ) as job:
        store = connect_store(job.ranks[0].master_addr, job.ranks[0].master_port, timeout=TIMEOUT)
        store.set(f"seen/{env.rank}", str(job.ranks[0].master_port))
        ports = [store.get(f"seen/{index}").decode() for index in range(2)]
        job.leave()
        return [rank.rank for rank in job.ranks], ports


def test_tasks_meet_over_the_launchers_store_attempt_after_attempt():
    seen = set()
    with serve_store("127.0.0.1") as port:
        for _ in range(3):
            (first, ports), (second, same) = run_ranks(lambda env: meet(env, port), 2, timeout_s=60)
            assert (first, second) == ([0, 1], [2, 3])
            assert ports == same == [ports[0]] * 2
            seen.add(ports[0])
    assert len(seen) == 3, "an attempt met at the place of an earlier one"


def test_tasks_meet_at_a_given_port():
    def main(env):
        with join_job(task(env.rank, port), num_nodes=2, ranks_per_node=2, interface=None, timeout=TIMEOUT) as job:
            store = connect_store(job.ranks[0].master_addr, job.ranks[0].master_port, timeout=TIMEOUT)
            store.add("here", 1)
            job.leave()
            return job.ranks[0].master_port

    with reserved_port() as port:
        assert run_ranks(main, 2, timeout_s=60) == [port, port]


def test_a_task_that_never_comes_is_named():
    with (
        serve_store("127.0.0.1") as port,
        pytest.raises(ValueError, match=r"tasks \[1\] did not join the job's store at 127\.0\.0\.1:\d+ within 1 s"),
        join_job(
            task(0, port, agent_store=True), num_nodes=2, ranks_per_node=2, interface=None, timeout=timedelta(seconds=1)
        ),
    ):
        pass


def test_a_store_that_is_not_there_is_named():
    with (
        reserved_port() as port,
        pytest.raises(ValueError, match=f"no answer from the job's store at 127.0.0.1:{port} within 1 s"),
    ):
        connect_store("127.0.0.1", port, timeout=timedelta(seconds=1))


def test_a_port_that_is_taken_is_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*set MASTER_PORT"),
        serve_store("127.0.0.1", other.getsockname()[1]),
    ):
        pass


def test_a_store_listens_on_its_address_only():
    before = set(psutil.Process().children())
    with serve_store("127.0.0.2") as port:
        connect_store("127.0.0.2", port, timeout=TIMEOUT).set("key", "value")
        [server] = set(psutil.Process().children()) - before
        # Not by a refused connection: on another address the port may be somebody else's.
        listening = [place.laddr for place in server.net_connections("tcp") if place.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.2", port)]


KILLED_SERVER = """
import os, signal
from mrl.launch.store import serve_store
with serve_store("127.0.0.1") as port:
    print(port, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_store_outlives_its_task():
    # Returns when nobody holds the other end of the pipe any more.
    server = subprocess.run([sys.executable, "-c", KILLED_SERVER], stdout=subprocess.PIPE, check=False, timeout=60)
    assert server.returncode == -9
    assert int(server.stdout) > 0


def test_a_rank_has_no_thread_before_it_joins_its_group():
    def main(env):
        before = len(os.listdir("/proc/self/task"))
        store = connect_store(env.master_addr, env.master_port, timeout=TIMEOUT)
        store.add("ranks", 1)
        return len(os.listdir("/proc/self/task")) - before

    assert run_ranks(main, 2, timeout_s=60) == [0, 0]


def test_ranks_of_one_host_stay_on_the_loopback_interface():
    def main(env):
        return os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"], env.host_address

    loopback = interface_of("127.0.0.1")
    assert run_ranks(main, 1, timeout_s=60) == [(loopback, f"={loopback}", "127.0.0.1")]


def test_a_users_interface_is_kept(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert run_ranks(lambda env: os.environ["GLOO_SOCKET_IFNAME"], 1, timeout_s=60) == ["mine"]


def test_addresses_that_other_hosts_cannot_use_are_refused():
    with pytest.raises(ValueError, match=r"reaches from 127\.0\.0\.1, where no other host does"):
        find_host_address("127.0.0.1", interface=None, environ={})
    with pytest.raises(ValueError, match="has no network interface none9"):
        find_host_address("10.0.0.1", interface="none9", environ={})
    with pytest.raises(ValueError, match="has no network interface none8"):
        find_host_address("10.0.0.1", interface=None, environ={"GLOO_SOCKET_IFNAME": "none8"})
    with pytest.raises(ValueError, match=r"has the address 203\.0\.113\.9"):
        socket_variables("203.0.113.9")


def test_ipv6_addresses_stand_in_brackets():
    assert join_host_port("fd00::1", 80) == "[fd00::1]:80"
    assert join_host_port("10.0.0.1", 80) == "10.0.0.1:80"
    assert join_host_port("head", 80) == "head:80"
