"""The hosts themselves: what they share and what they do not."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("ipv6", [False, True])
def test_hosts_reach_each_other_by_name_and_keep_their_memory(make_hosts, tmp_path, ipv6):
    hosts = make_hosts(3, ipv6=ipv6)
    server = hosts.start(0, lambda: _answer(hosts.addresses[0], ipv6), tmp_path / "server")
    clients = [hosts.start(index, _ask, tmp_path / f"client{index}") for index in (1, 2)]
    assert [client.wait(30) for client in clients] == [0, 0], [client.output() for client in clients]
    assert server.wait(30) == 0, server.output()
    names = [line.split() for line in server.output().splitlines()]
    assert sorted(names) == [["host1", hosts.addresses[1]], ["host2", hosts.addresses[2]]]
    assert [hosts.shared_memory(index) for index in range(3)] == [{"of_host0"}, {"of_host1"}, {"of_host2"}]
    assert not Path("/dev/shm/of_host1").exists()


def test_a_host_that_is_shut_down_or_unplugged_answers_nobody(make_hosts, tmp_path):
    hosts = make_hosts(2)
    server = hosts.start(1, lambda: _listen(hosts.addresses[1]), tmp_path / "server")

    def reaches() -> bool:
        return hosts.start(0, _connect, tmp_path / "client").wait(60) == 0

    assert reaches()
    assert (hosts.addresses[1], 4000) in hosts.listening(1)
    hosts.set_link(1, "down")
    assert not reaches()
    hosts.set_link(1, "up")
    assert reaches()
    hosts.shut_down(1)
    assert server.wait(30) == 128 + 9


ABANDONED = """
import os, sys, signal
from pathlib import Path
from namespaces import Hosts
hosts = Hosts(2, Path(sys.argv[1])).__enter__()
hosts.run(1, ["sleep", "600"], Path(sys.argv[1]) / "log")
print(*[init.pid for init in hosts._inits], *[keeper.pid for keeper in hosts._keepers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_hosts_whose_test_was_killed(make_hosts, tmp_path):
    make_hosts(1)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(tmp_path)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -9, killed.stderr
    started = [int(pid) for pid in killed.stdout.split()]
    assert len(started) == 5
    deadline = time.monotonic() + 30
    while alive := [pid for pid in started if _runs(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} were left behind"
        time.sleep(0.05)


def _answer(address: str, ipv6: bool) -> None:
    Path("/dev/shm/of_host0").touch()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with socket.create_server((address, 4000), family=family) as server:
        server.settimeout(30)
        for _ in range(2):
            connection, peer = server.accept()
            with connection:
                sys.stdout.write(f"{connection.recv(100).decode()} {peer[0]}\n")


def _listen(address: str) -> None:
    with socket.create_server((address, 4000)):
        signal.pause()


def _connect() -> None:
    """Up to 5 s: a cable that was just plugged in takes a moment."""
    for _ in range(5):
        try:
            socket.create_connection(("host1", 4000), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("host1 does not answer")


def _ask() -> None:
    name = socket.gethostname()
    Path(f"/dev/shm/of_{name}").touch()
    for _ in range(200):
        try:
            with socket.create_connection(("host0", 4000), timeout=30) as connection:
                connection.sendall(name.encode())
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("host0 does not listen")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
