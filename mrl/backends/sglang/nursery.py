"""Forking an engine's processes at any time, also from a trainer that has threads by then.

A fork copies one thread and the locks of all: forked from a trainer in the middle of its work (gloo, ZeroMQ and
checkpoint threads run), a child may wait for ever. So a process with one thread is forked early, while the trainer has
one too, and forks the engine's processes when asked, in milliseconds and with every import done.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from mrl.launch.lifeline import die_with_parent

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!Q")
_NUMBER = struct.Struct("!q")
_MAX_FDS = 16
_LOST = 255
"""Exit status of a process whose nursery ended before it could be told; both are gone then."""

_received: list[int] = []
"""In a process that was just forked: the descriptors that came with its task."""


class Nursery:
    """A single-threaded process that forks others for this one; all of them die with the thread that made it.

    Make it before this process has threads: what they hold at that moment stays held in the nursery and its children.
    """

    def __init__(self) -> None:
        if threading.active_count() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate())
            logger.warning("engines are forked from a process with threads (%s); they may hang in their start", names)
        mine, its = socket.socketpair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            mine.close()
            _serve(its, parent)
        its.close()
        self._socket = mine

    def Process(
        self, *, target: Callable[..., None], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> NurseryProcess:
        """A process like multiprocessing's; it gets this process's environment of the moment it starts."""
        return NurseryProcess(self, target, args, kwargs or {})

    def fork(self, task: bytes, fds: Sequence[int]) -> None:
        """Have a process forked that unpickles and runs `task`; the first of `fds` takes its pid and exit status."""
        socket.send_fds(self._socket, [_LENGTH.pack(len(task))], list(fds))
        self._socket.sendall(task)

    def close(self) -> None:
        """End the nursery and, with it, whatever it forked; idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            os.waitpid(self._pid, 0)


class NurseryProcess:
    """The part of `multiprocessing.Process` that SGLang and this package use."""

    def __init__(
        self, nursery: Nursery, target: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self._nursery = nursery
        self._task = (target, tuple(args), dict(kwargs))
        self._reader = -1
        self.pid: int | None = None
        self._exitcode: int | None = None

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        return self._reader

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        if self._exitcode is None and self.pid is not None and select.select([self._reader], [], [], 0)[0]:
            self._exitcode = _read_number(self._reader, or_else=_LOST)
        return self._exitcode

    def start(self) -> None:
        """Start it; returns once it has a pid.

        Raises:
            ChildProcessError: the nursery is gone.
        """
        self._reader, writer = os.pipe()
        try:
            task, fds = _pickle((*self._task, dict(os.environ)))
            self._nursery.fork(task, [writer, *fds])
        except OSError as error:
            raise ChildProcessError(f"the process that forks the engine's processes is gone: {error}") from error
        finally:
            os.close(writer)
        self.pid = _read_number(self._reader, or_else=None)
        if self.pid is None:
            raise ChildProcessError("the process that forks the engine's processes ended while it forked one")

    def is_alive(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.pid is not None and self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_alive():
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], remaining)[0]:
                return

    def close(self) -> None:
        """Release what the process was watched with."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1


def _read_number(reader: int, *, or_else: int | None) -> int | None:
    data = os.read(reader, _NUMBER.size)
    return _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else or_else


class _Pickler(ForkingPickler):
    """Replaces pipe ends by the place of their descriptor among those that travel along."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fds: list[int] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Connection):
            return NotImplemented
        self.fds.append(value.fileno())
        return _connection, (len(self.fds), value.readable, value.writable)


def _pickle(task: Any) -> tuple[bytes, list[int]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(task)
    return file.getvalue(), pickler.fds


def _connection(index: int, readable: bool, writable: bool) -> Connection:
    return Connection(_received[index], readable=readable, writable=writable)


def _serve(requests: socket.socket, parent: int) -> None:
    """The nursery's whole life; never returns."""
    try:
        die_with_parent(parent)
        gc.freeze()
        # Children that fail send their parent SIGQUIT; Ctrl-C reaches the whole foreground group.
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        wake = os.pipe()
        os.set_blocking(wake[1], False)
        signal.set_wakeup_fd(wake[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _notice)
        _answer(requests, wake)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _notice(signum: int, frame: Any) -> None:
    """Nothing: a handler has to be there for the wake-up descriptor to be written."""


def _answer(requests: socket.socket, wake: tuple[int, int]) -> None:
    """Fork on request and report ends, until the other side closes; `wake` is a pipe that signals write to."""
    watchers: dict[int, int] = {}
    nursery = os.getpid()
    while True:
        ready, _, _ = select.select([requests.fileno(), wake[0]], [], [])
        if wake[0] in ready:
            os.read(wake[0], 4096)
            _report_ends(watchers)
        if requests.fileno() not in ready:
            continue
        header, fds, _, _ = socket.recv_fds(requests, _LENGTH.size, _MAX_FDS)
        if not header:
            return
        task = _receive(requests, _LENGTH.unpack(header)[0])
        pid = os.fork()
        if pid == 0:
            _run(task, fds, requests, wake, nursery)
        os.write(fds[0], _NUMBER.pack(pid))
        watchers[pid] = fds[0]
        for fd in fds[1:]:
            os.close(fd)


def _report_ends(watchers: dict[int, int]) -> None:
    while watchers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        writer = watchers.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(writer)


def _receive(requests: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = requests.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _set_environment(environment: Mapping[str, str]) -> None:
    # Only what differs: a process that clears all of it can no longer change its title.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def _run(task: bytes, fds: list[int], requests: socket.socket, wake: tuple[int, int], nursery: int) -> None:
    """Be the new process; never returns."""
    status = 1
    try:
        die_with_parent(nursery)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        requests.close()
        for fd in (*wake, fds[0]):
            os.close(fd)
        _received[:] = fds
        target, args, kwargs, environment = ForkingPickler.loads(task)
        _set_environment(environment)
        target(*args, **kwargs)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
