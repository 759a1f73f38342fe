"""One host of a job on Ray: an actor that owns the host's task, a process of its own.

Ray's workers hold threads, and ranks are forked: so they come from a fresh process, which gets the configuration on its
standard input and ends with the actor.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mrl.launch.addresses import JOB_PORTS, family_of, find_host_address
from mrl.launch.ray_task import read_report

_GRACE_S = 15.0
"""For the task to stop its ranks, which have 10 s."""
_MOST_PORTS = 100
_READ_BYTES = 1 << 16
_PROGRAM = "import sys; sys.path[:] = {path!r}; from mrl.launch.ray_task import main; sys.exit(main({report}))"


@dataclass(kw_only=True, frozen=True)
class TaskSpec:
    """What a host's task is started with."""

    config: str
    """The resolved configuration as YAML."""
    environment: Mapping[str, str]
    """Variables on top of the worker's own."""
    folder: str
    """Working directory, where the host has it; else the worker's."""
    log: str
    """File for all that the task and its ranks print; it is appended to."""


@dataclass(kw_only=True, frozen=True)
class TaskEnd:
    """How a host's task ended."""

    status: int
    """Exit status; negative: killed by that signal."""
    error: str | None
    """The task's own error, if it could still tell."""


class HostActor:
    """Runs in a Ray worker on the host, with two threads: `stop` is called while `run` is under way."""

    def __init__(self, program: str = _PROGRAM) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def address(self, node_address: str, interface: str | None) -> str:
        """This host's address: MRL_HOST_ADDRESS, else that on the interface, else that by which Ray knows the host.

        Raises:
            ValueError: there is no such interface, or it has no address.
        """
        if interface and "MRL_HOST_ADDRESS" not in os.environ:
            return find_host_address(node_address, interface=interface, environ={})
        return os.environ.get("MRL_HOST_ADDRESS", node_address)

    def free_port(self, address: str) -> int:
        """A port for the job's store, on which nothing listens at this host's address.

        Raises:
            ValueError: none of those that were tried is free.
        """
        for port in random.sample(JOB_PORTS, _MOST_PORTS):
            with suppress(OSError), socket.create_server((address, port), family=family_of(address)):
                return port
        raise ValueError(f"no free port found at {address} among {_MOST_PORTS} of {JOB_PORTS}")

    def run(self, spec: TaskSpec) -> Iterator[tuple[str, ...] | TaskEnd]:
        """Run the task; yields its lines as they come, and at last how it ended."""
        log = Path(spec.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        process = self._process = _start(self._program, spec, writer)
        os.close(writer)
        try:
            with log.open("a", encoding="utf-8", buffering=1) as file:
                _send(process, spec.config)
                for lines in read_lines(process):
                    file.writelines(f"{line}\n" for line in lines)
                    yield lines
            yield TaskEnd(status=process.wait(), error=read_report(reader))
        finally:
            os.close(reader)
            _end(process)

    def stop(self) -> None:
        """Have the task stop its ranks and end; `run` goes on until it has."""
        if self._process is not None:
            self._process.terminate()


def sort_gpus(names: Iterable[str]) -> list[str]:
    """GPU indices in numerical order, other names in alphabetical order behind them."""
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def read_lines(process: subprocess.Popen[bytes]) -> Iterator[tuple[str, ...]]:
    """The lines that a process prints, as they come, until it has ended, whatever else holds its output open."""
    assert process.stdout is not None
    output, ended, rest = process.stdout.fileno(), os.pidfd_open(process.pid), b""
    try:
        while output in select.select([output, ended], [], [])[0] and (data := os.read(output, _READ_BYTES)):
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                yield tuple(line.decode(errors="replace") for line in lines)
    finally:
        os.close(ended)
    if rest:
        yield (rest.decode(errors="replace"),)


def _start(program: str, spec: TaskSpec, report: int) -> subprocess.Popen[bytes]:
    gpus = _assigned_gpus()
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return subprocess.Popen(
        [sys.executable, "-c", program.format(path=sys.path, report=report)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **devices, **spec.environment},
        cwd=spec.folder if Path(spec.folder).is_dir() else None,
        pass_fds=(report,),
        # Signals from a terminal are the driver's to handle.
        start_new_session=True,
    )


def _assigned_gpus() -> list[str]:
    import ray  # an optional dependency; this process is Ray's

    return sort_gpus(str(name) for name in ray.get_gpu_ids()) if ray.is_initialized() else []


def _send(process: subprocess.Popen[bytes], config: str) -> None:
    """Write the configuration after its length; the pipe stays open, as what keeps the task alive."""
    assert process.stdin is not None
    content = config.encode()
    with suppress(BrokenPipeError):  # it ended already, and has said why
        process.stdin.write(b"%d\n" % len(content) + content)
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(BrokenPipeError):
            stream.close()
