"""Hosts on one machine: Linux network namespaces joined by a bridge, each with an address and a name of its own.

A host also has its own processes, mounts, /dev/shm and System V memory, so that hosts cannot open each other's shared
memory; files they share. All of it hangs on one process per host, and that on this one: when it ends, however it ends,
the kernel removes the host with every process in it. Nothing has a name that could be left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mrl.launch.lifeline import die_with_parent

_NEEDED = ("ip", "unshare", "nsenter", "setpriv", "bash")
_REFUSALS = ("not permitted", "denied", "not supported", "unknown device type", "no such device")
_NAMESPACES = ("net", "uts", "ipc", "pid", "mnt")
"""The mounts last: /proc is looked at before."""

# Ends when the test process does, and reaps what the host's programs leave.
_INIT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mount -t sysfs sysfs /sys
mount --bind {hosts_file} /etc/hosts
# No name server is in reach, and each question to one would take its time.
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
echo ready
read -r _ || true
"""


class Unavailable(Exception):
    """This machine lets nobody make namespaces here; the message says why."""


class Hosts:
    """`count` hosts with the addresses 10.77.0.1, 10.77.0.2, ... or fd77::1, fd77::2, ...; a context.

    Raises (on entry):
        Unavailable: no root, no `ip`, or no permission.
    """

    def __init__(self, count: int, folder: Path, *, ipv6: bool = False) -> None:
        self.names = [f"host{index}" for index in range(count)]
        self.addresses = [f"fd77::{index + 1}" if ipv6 else f"10.77.0.{index + 1}" for index in range(count)]
        self._prefix = 64 if ipv6 else 24
        self._folder = folder
        self._keepers: list[subprocess.Popen[str]] = []
        self._inits: list[psutil.Process] = []
        self._processes: list[HostProcess] = []

    def __enter__(self) -> Hosts:
        _require_tools()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, host: int, work: Callable[[], Any], log: Path, **environ: str) -> HostProcess:
        """Run `work` on a host, in a process forked from this one; its exit status is what `work` returns, or 1.

        Args:
            log: takes its stdout and stderr.
            environ: set for it.
        """
        process = HostProcess(self._inits[host].pid, work, log, environ)
        self._processes.append(process)
        return process

    def run(self, host: int, program: Sequence[str], log: Path, **environ: str) -> HostProcess:
        """Run a program on a host; `start` with an exec."""
        return self.start(host, lambda: os.execvp(program[0], list(program)), log, **environ)

    def processes(self, host: int) -> list[psutil.Process]:
        """What runs on a host."""
        running = []
        for process in self._inits[host].children(recursive=True) + self._entered(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        return running

    def shared_memory(self, host: int) -> set[str]:
        """Names in a host's /dev/shm."""
        return set(os.listdir(f"/proc/{self._inits[host].pid}/root/dev/shm"))

    def listening(self, host: int) -> list[tuple[str, int]]:
        """(address, port) of every TCP socket that listens on a host."""
        table = _inside(self._inits[host].pid, "ss", "--tcp", "--listening", "--numeric", "--no-header")
        places = [line.split()[3].rpartition(":") for line in table.splitlines()]
        return [(address.strip("[]").split("%")[0], int(port)) for address, _, port in places]

    def set_link(self, host: int, state: str) -> None:
        """Plug a host's cable in ("up") or out ("down"); the host itself goes on."""
        _inside(self._keepers[-1].pid, "ip", "link", "set", self.names[host], state)

    def shut_down(self, host: int) -> None:
        """End a host at once, with everything that runs on it, as a power failure would."""
        self._inits[host].kill()
        self._keepers[host].wait(timeout=30)

    def close(self) -> None:
        """Remove all hosts."""
        for process in self._processes:
            process.kill()
        for init in self._inits:
            with contextlib.suppress(psutil.NoSuchProcess):
                init.kill()
        for keeper in self._keepers:
            if keeper.stdin is not None:
                keeper.stdin.close()
            keeper.wait(timeout=30)
            for pipe in (keeper.stdout, keeper.stderr):
                if pipe is not None:
                    pipe.close()

    def _build(self) -> None:
        hosts_file = self._folder / "hosts"
        lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))
        for name in self.names:
            init = _INIT.format(name=name, hosts_file=hosts_file)
            keeper = _keep("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc", script=init)
            self._keepers.append(keeper)
            self._inits.append(psutil.Process(keeper.pid).children()[0])
        self._keepers.append(_keep(script="echo ready; read -r _ || true"))
        self._connect(self._keepers[-1].pid)

    def _connect(self, switch: int) -> None:
        _inside(switch, "ip", "link", "add", "bridge", "type", "bridge")
        _inside(switch, "ip", "link", "set", "bridge", "up")
        for name, address, init in zip(self.names, self.addresses, self._inits, strict=True):
            pair = ("type", "veth", "peer", "name", "eth0", "netns", str(init.pid))
            _inside(switch, "ip", "link", "add", name, *pair)
            _inside(switch, "ip", "link", "set", name, "master", "bridge", "up")
            # An IPv6 address that still waits for a duplicate to answer cannot be bound.
            flags = ["nodad"] if ":" in address else []
            _inside(init.pid, "ip", "address", "add", f"{address}/{self._prefix}", "dev", "eth0", *flags)
            for link in ("lo", "eth0"):
                _inside(init.pid, "ip", "link", "set", link, "up")

    def _entered(self, host: int) -> list[psutil.Process]:
        """Programs that came into a host from outside are not children of its first process."""
        itself = psutil.Process()
        namespace = os.readlink(f"/proc/{self._inits[host].pid}/ns/pid")
        found = []
        for process in itself.children(recursive=True):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace and process not in self._inits:
                    found.append(process)
        return found


class HostProcess:
    """A process of this one's that lives on a host."""

    def __init__(self, init: int, work: Callable[[], Any], log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        self._status: int | None = None
        # What is still buffered here must not be written a second time there.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _enter_and_run(init, work, log, environ)

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout_s: float) -> int:
        """The exit status, once it ended."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"no end within {timeout_s:.0f} s:\n{self.output()}"
            time.sleep(0.05)
        return status

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        """SIGKILL to the process that entered the host."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _enter_and_run(init: int, work: Callable[[], Any], log: Path, environ: Mapping[str, str]) -> None:
    """In a forked process: enter the host, run `work` in a child there, end with its status. Does not return."""
    status = 1
    try:
        die_with_parent(None)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        folder = Path.cwd()
        namespaces = [os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
        for namespace in namespaces:
            os.setns(namespace)
            os.close(namespace)
        os.chdir(folder)
        os.environ.update(environ)
        # A process enters a process namespace with its children only.
        child = os.fork()
        if child == 0:
            die_with_parent(None)
            status = int(work() or 0)
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if status >= 0 else 128 - status)


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise Unavailable("namespaces need root")
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"no program {', '.join(missing)}; install iproute2 and util-linux")


def _keep(*options: str, script: str) -> subprocess.Popen[str]:
    """Namespaces that live as long as this process, with `script` as the first process in them."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *options, "bash", "-c", script]
    pipe = subprocess.PIPE
    keeper = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    if keeper.stdout.readline() != "ready\n":
        keeper.kill()
        _refuse(" ".join(command[3:5]), keeper.communicate()[1])
    return keeper


def _inside(pid: int, *command: str) -> str:
    """Output of a command on the network of process `pid`."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", *command], check=False, capture_output=True, text=True
    )
    if done.returncode:
        _refuse(" ".join(command), done.stderr)
    return done.stdout


def _refuse(what: str, error: str) -> None:
    message = f"{what}: {error.strip()}"
    if any(refusal in error.lower() for refusal in _REFUSALS):
        raise Unavailable(message)
    raise RuntimeError(message)
