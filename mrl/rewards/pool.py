"""Worker processes that score items concurrently, each item under a time limit."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from mrl.rewards.messages import Conversation, Item, Outcome, Preparing, Ready, decode_answer
from mrl.rewards.sandbox import clean_environment
from mrl.rewards.worker import FunctionSpec

_START_LIMIT_S = 300.0
"""For imports: a user's file may want torch, a verifier sympy, on a busy machine."""
_ASYNC_GRACE_S = 5.0
"""A coroutine ends its own items in time; past this much more, it must be blocking its event loop."""
_END_S = 10.0
_MOST_BYTES = 1 << 28
"""Of one answer: a worker's word is not enough to take more memory."""


Call = Item | Conversation

SKIPPED = Outcome(0.0, {}, "was not scored because another sample failed")


@dataclass(kw_only=True, frozen=True)
class Limits:
    """What each worker may do."""

    timeout_s: float
    """Wall-clock time for one item."""
    sandbox: bool = False
    """Whether it goes without network and sees no other process."""
    pass_environment: tuple[str, ...] = ()
    """Environment variables that it gets although they look like secrets or like the cluster's."""


class WorkerPool:
    """Up to `num_workers` processes, started when first needed, replaced when they hang or die.

    Safe to call from several threads, and usable in a forked child (which starts workers of its own). The workers end
    with `close`, at exit, and when this process dies in any other way.
    """

    def __init__(self, spec: FunctionSpec, limits: Limits, *, num_workers: int) -> None:
        self._spec = spec
        self._limits = limits
        self._num_workers = num_workers
        self._open()

    def _open(self) -> None:
        self._owner_pid = os.getpid()
        self._closed = False
        self._is_async: bool | None = None
        self._executor = ThreadPoolExecutor(self._num_workers, thread_name_prefix="reward")
        self._workers = [_Worker(self._spec, self._limits) for _ in range(self._num_workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def check_function(self) -> bool:
        """Start one worker, which loads the function; returns whether it is a coroutine function.

        Raises:
            ValueError: the function cannot be loaded.
        """
        if self._is_async is None:
            worker = self._idle.get()
            try:
                self._is_async = worker.start()
            finally:
                self._idle.put(worker)
        return self._is_async

    def score(self, items: Sequence[Call], *, stop_at_failure: bool) -> list[Outcome]:
        """The outcome of each item, in order; items not reached because another failed have outcome `SKIPPED`."""
        if os.getpid() != self._owner_pid:
            self._open()
        chunks = self._split(items)
        futures = [self._executor.submit(self._score_chunk, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                if stop_at_failure and any(outcome.error for outcome in future.result()):
                    break
        finally:
            for future in futures:
                future.cancel()
        results: list[Outcome] = []
        for chunk, future in zip(chunks, futures, strict=True):
            reached = future.done() and not future.cancelled()
            results.extend(future.result() if reached else [SKIPPED] * len(chunk))
        return results

    def _split(self, items: Sequence[Call]) -> list[Sequence[Call]]:
        """One item per request, so that a slow one holds up no other; for a coroutine function, equal shares."""
        if not items:
            return []
        size = -(-len(items) // self._num_workers) if self.check_function() else 1
        return [items[first : first + size] for first in range(0, len(items), size)]

    def _score_chunk(self, chunk: Sequence[Call]) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.score(chunk)
        finally:
            if self._closed:
                worker.stop()
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers, also those at work; idempotent."""
        if os.getpid() == self._owner_pid:
            self._closed = True
            self._executor.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.stop()


class _Worker:
    """The parent's end of one worker process. Used by one thread at a time, except for `stop`."""

    def __init__(self, spec: FunctionSpec, limits: Limits) -> None:
        self._spec = spec
        self._limits = limits
        self._running: _Process | None = None
        self._is_async = False

    def start(self) -> bool:
        """Start the process unless it runs; returns whether its function is a coroutine function.

        Raises:
            ValueError: the worker cannot load its function.
        """
        if self._running is None:
            running = _Process(self._limits)
            try:
                running.send((self._spec, self._limits.timeout_s))
                ready = running.receive(_START_LIMIT_S, Ready)
            except _WorkerLostError as error:
                ready = Ready(False, f"its process {error}")
            if ready.error is not None:
                running.stop()
                raise ValueError(f"cannot load the {self._spec.kind}: {ready.error}")
            self._running, self._is_async = running, ready.is_async
        return self._is_async

    def score(self, chunk: Sequence[Call]) -> list[Outcome]:
        """The outcomes of a chunk; a process that hangs or dies fails the whole chunk and is ended."""
        is_async = self.start()
        assert self._running is not None
        limit_s = self._limits.timeout_s + (_ASYNC_GRACE_S if is_async else 0.0)
        try:
            self._running.send(list(chunk))
            answer = self._running.receive(limit_s, list, Preparing)
            if isinstance(answer, Preparing):
                self._running.receive(_START_LIMIT_S, Preparing)
                answer = self._running.receive(limit_s, list)
            if len(answer) != len(chunk):
                raise _WorkerLostError(f"gave {len(answer)} outcomes for {len(chunk)} samples")
            return answer
        except _WorkerLostError as error:
            self.stop()
            return [Outcome(0.0, {}, str(error))] * len(chunk)

    def stop(self) -> None:
        """End the process, if there is one."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()


class _Process:
    """One operating-system process with its connection and lifeline."""

    def __init__(self, limits: Limits) -> None:
        self.connection, theirs = Pipe()
        their_lifeline, lifeline = os.pipe()
        # The path travels in the program: in PYTHONPATH it would reach whatever programs a verifier starts.
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from mrl.rewards.worker import main; "
            f"main({theirs.fileno()}, {their_lifeline}, sandboxed={limits.sandbox})"
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                env=clean_environment(os.environ, limits.pass_environment),
                pass_fds=(theirs.fileno(), their_lifeline),
                # A session of its own: Ctrl-C is the trainer's to handle, and whatever a verifier starts ends with it.
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(their_lifeline)
        self.stop = weakref.finalize(self, _stop, self._process, self.connection, lifeline, os.getpid())

    def send(self, message: Any) -> None:
        """Raises _WorkerLostError if the process is gone."""
        try:
            self.connection.send(message)
        except OSError as error:
            raise _WorkerLostError(self._how_it_died()) from error

    def receive(self, limit_s: float, *expected: type) -> Any:
        """The next message; raises _WorkerLostError if there is none in time, or it is no expected one."""
        try:
            if not self.connection.poll(limit_s):
                raise _WorkerLostError(f"took longer than its time limit of {limit_s:g} s")
            answer = decode_answer(self.connection.recv_bytes(_MOST_BYTES))
        except (EOFError, OSError) as error:
            raise _WorkerLostError(self._how_it_died()) from error
        except ValueError as error:
            raise _WorkerLostError(f"broke off: {error}") from error
        if not isinstance(answer, expected):
            raise _WorkerLostError(f"broke off: it answered {answer!r:.80}")
        return answer

    def _how_it_died(self) -> str:
        try:
            return f"died (exit status {self._process.wait(_END_S)})"
        except subprocess.TimeoutExpired:
            return "closed its connection"


class _WorkerLostError(Exception):
    """A worker process hangs or is gone; the message is the end of a sentence about what it worked on."""


def _stop(process: subprocess.Popen[bytes], connection: Connection, lifeline: int, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child inherited the object, not the worker
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    os.close(lifeline)
