"""SGLang's engine in a trainer's process: started, called with a deadline, watched, started again, stopped."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sglang.srt.managers.io_struct import FreezeGCReq, GenerateReqInput

from mrl.backends.sglang.launch import ChildProcesses, StartedEngine, close_sockets, start_engine
from mrl.backends.sglang.nursery import Nursery
from mrl.backends.sglang.parts import EnginePart, FailureBoard
from mrl.backends.sglang.requests import sampling_dict
from mrl.interfaces import EngineDiedError, EngineError
from mrl.types import SamplingParams

_POLL_S = 0.2


class EngineSupervisor:
    """One engine, whose processes may be replaced. All calls come from the thread that made it.

    On CPU its processes are forked: make it while this process has one thread, with `preload_sglang` done. With CUDA
    they are spawned, since contexts do not survive a fork.

    Args:
        server_args: of SGLang's `Engine`.
        part: which of the engine's hosts this is; None is an engine that needs no job around it.
        environment: variables for the engine's processes only.
        log_path: takes their output; None keeps it in a temporary file for error messages.
    """

    def __init__(
        self,
        server_args: Mapping[str, Any],
        *,
        forks: bool,
        part: EnginePart | None,
        environment: Mapping[str, str],
        start_timeout_s: float,
        call_timeout_s: float,
        log_path: Path | None,
    ) -> None:
        self._server_args = server_args
        self._part = part
        self._starts = 0
        self._environment = environment
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self._log_path = log_path
        self._nursery = Nursery() if forks else None
        timeout = timedelta(seconds=start_timeout_s)
        self.board = FailureBoard(part, timeout=timeout) if part and part.num_hosts > 1 else None
        """Where the parts of an engine that spans hosts report; None for others."""
        self._started: StartedEngine | None = None
        self._failure: str | None = None

    @property
    def manager(self) -> Any:
        """SGLang's tokenizer manager, which takes requests.

        Raises:
            EngineDiedError: the engine is dead.
        """
        return self._alive().engine.tokenizer_manager

    @property
    def is_dead(self) -> bool:
        """Whether a process has ended or a call missed its deadline."""
        started = self._started
        return started is None or self._failure is not None or bool(started.children.dead())

    @property
    def children(self) -> ChildProcesses:
        """The processes that run now.

        Raises:
            EngineDiedError: the engine is dead.
        """
        return self._alive().children

    def start(self, during_start: Callable[[], None] | None = None) -> dict[str, Any]:
        """Start the engine's processes; returns what a scheduler reports of itself.

        Args:
            during_start: runs in this process while they load; the time it takes does not count.

        Raises:
            EngineError: the engine did not start; the message carries its processes' last error lines.
        """
        deadline = time.monotonic() + self._start_timeout_s
        part, board = self._part, self.board
        if board is not None:
            board.start = self._starts
        self._started = started = start_engine(
            self._server_args,
            context=self._nursery or multiprocessing.get_context("spawn"),
            environment={**self._environment, **(part.environment(start=self._starts) if part else {})},
            timeout_s=self._start_timeout_s,
            log_path=self._log_path,
            during_start=during_start,
            board=board,
        )
        self._failure = None
        self._starts += 1
        if part is None or part.leads:
            self._first_call(deadline)
        started.children.unlink_files()
        return started.scheduler_info

    def call(
        self,
        work: Coroutine[Any, Any, Any],
        what: str,
        timeout_s: float | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> Any:
        """Run `work` on the engine's event loop and return its result.

        Args:
            progress: whatever changes as the work goes on; with every change the time begins anew.

        Raises:
            EngineDiedError: the engine is dead, dies, or takes longer than `timeout_s`; other calls then fail, too.
        """
        try:
            started = self._alive()
        except EngineError:
            work.close()
            raise
        started.children.mark()
        limit = self._call_timeout_s if timeout_s is None else timeout_s
        return started.engine.loop.run_until_complete(self._supervise(started, work, what, limit, progress))

    def stop(self) -> None:
        """Kill and reap the engine's processes; other children of this process are left alone. Idempotent."""
        started, self._started = self._started, None
        if started is None:
            return
        started.children.stop()
        _close_loop(started.engine)
        signal.signal(signal.SIGQUIT, started.previous_quit)

    def close(self) -> None:
        """Stop the engine for good."""
        self.stop()
        if self._nursery is not None:
            self._nursery.close()

    def _first_call(self, deadline: float) -> None:
        # SGLang takes these in its first call.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
        try:
            self.call(self._warm_up(handlers), "warm-up", deadline - time.monotonic())
        except BaseException:
            self.stop()
            raise

    def _alive(self) -> StartedEngine:
        started = self._started
        if started is None:
            raise EngineError("engine cannot be used: it was shut down")
        if self._failure is None and (dead := started.children.dead()):
            self._failure = started.children.explain(f"engine died ({'; '.join(dead)})")
        if self._failure is not None:
            raise EngineDiedError(f"engine cannot be used: {self._failure}")
        return started

    async def _supervise(
        self,
        started: StartedEngine,
        work: Coroutine[Any, Any, Any],
        what: str,
        timeout_s: float,
        progress: Callable[[], object],
    ) -> Any:
        task = asyncio.ensure_future(work)
        begin, seen = time.monotonic(), progress()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                if task.done():
                    break
                if dead := started.children.dead():
                    self._failure = started.children.explain(f"engine died during {what} ({'; '.join(dead)})")
                elif (now := progress()) != seen:
                    begin, seen = time.monotonic(), now
                elif time.monotonic() - begin > timeout_s:
                    more = "" if seen is None else f", and nothing came in between: {seen}"
                    self._failure = started.children.explain(f"{what} took longer than {timeout_s:.0f} s{more}")
                if self._failure:
                    raise EngineDiedError(self._failure)
        finally:
            task.cancel()
        return task.result()

    async def _warm_up(self, handlers: Mapping[signal.Signals, Any]) -> None:
        """First call: SGLang binds to its loop and takes SIGTERM and SIGQUIT; they are put back."""
        manager = self.manager
        manager.auto_create_handle_loop()
        for number, handler in handlers.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)
        one = sampling_dict(SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True))
        request = GenerateReqInput(input_ids=[[0]], sampling_params=one, return_logprob=True)
        await manager.generate_request(request, None).__anext__()
        # Only in the schedulers: freezing here would keep the trainer's cycles alive for ever.
        manager._dispatch_to_scheduler(FreezeGCReq())


def _close_loop(engine: Any) -> None:
    loop = engine.loop
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    if engine.tokenizer_manager is not None:
        for socket in (engine.tokenizer_manager.recv_from_detokenizer, engine.send_to_rpc):
            close_sockets(socket)
        engine.send_to_rpc = None
    loop.close()
    asyncio.set_event_loop(None)
