"""Starting and stopping an engine's processes without harm to the trainer that owns them.

SGLang's `Engine` assumes that the process is its own: it replaces signal handlers, logging and environment variables,
kills every child of the process when it stops and the process itself when a child fails. Here a trainer owns it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import psutil
import sglang.srt.entrypoints.engine as sglang_engine
from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.load_snapshot import shm_path_for

from mrl.backends.sglang import children
from mrl.backends.sglang.nursery import Nursery, NurseryProcess
from mrl.backends.sglang.parts import FailureBoard
from mrl.interfaces import EngineError

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 25
_LINE_WIDTH = 300
_KILL_WAIT_S = 30.0
_POLL_S = 0.2
_SHM = Path("/dev/shm")
"""Where tensor-parallel schedulers keep the queues they broadcast requests through, named by their process."""


ChildProcess = NurseryProcess | SpawnProcess


class ChildProcesses:
    """The processes of one engine. Also stands in for the `multiprocessing` module while SGLang starts them."""

    def __init__(
        self, context: Nursery | SpawnContext, log_path: Path | None, board: FailureBoard | None = None
    ) -> None:
        self._context = context
        self._board = board
        self.log_path = log_path or _temporary_log()
        self._log = self.log_path.open("ab+")
        self._seen = self._log.seek(0, os.SEEK_END)
        self.processes: list[ChildProcess] = []
        self.readers: list[Connection] = []
        self.files = [] if log_path else [self.log_path]
        """What the engine's processes need by name while they start, and would leave behind."""

    def Process(self, **kwargs: Any) -> ChildProcess:
        process = self._context.Process(**kwargs)
        self.processes.append(process)
        return process

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:
        reader, writer = multiprocessing.Pipe(duplex)
        self.readers.append(reader)
        return reader, writer

    def set_start_method(self, method: str, force: bool = False) -> None:
        """Keep the trainer's own start method; the context given here decides."""

    def dead(self) -> list[str]:
        """Descriptions of the processes that have ended, and of failures on the engine's other hosts."""
        ended = [process for process in self.processes if process.pid is not None and not process.is_alive()]
        elsewhere = self._board.read() if self._board else []
        return [*(f"pid {process.pid}, exit code {process.exitcode}" for process in ended), *elsewhere]

    def wait_ready(self, timeout_s: float) -> list[dict[str, Any]]:
        """What each scheduler reports once its model stands, in rank order.

        Raises:
            EngineError: a process ended, or not all were ready within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < len(self.readers):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise EngineError(self.explain(f"engine was not ready within {timeout_s:.0f} s"))
            waiting = {reader: rank for rank, reader in enumerate(self.readers) if rank not in reports}
            sentinels = [process.sentinel for process in self.processes]
            ready = wait([*waiting, *sentinels], min(remaining, _POLL_S) if self._board else remaining)
            for reader in waiting.keys() & set(ready):
                try:
                    reports[waiting[reader]] = reader.recv()
                except EOFError:
                    self.processes[waiting[reader]].join(remaining)
            if self.dead():
                raise EngineError(self.explain(f"engine failed to start ({'; '.join(self.dead())})"))
        return [reports[rank] for rank in range(len(self.readers))]

    def mark(self) -> None:
        """Let error messages leave out what the children have written so far."""
        self._seen = self._log.seek(0, os.SEEK_END)

    def explain(self, what: str) -> str:
        """`what`, followed by what the children wrote about it."""
        self._log.seek(max(self._seen, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        cause = cause_of(self._log.read().decode(errors="replace"))
        written = f"{what}; its processes wrote:\n{cause}" if cause else f"{what}; its processes wrote nothing"
        # What ended here may be no more than the echo of what ended there.
        elsewhere = [text for text in self._board.read_soon() if text not in what] if self._board else []
        return "\n".join([written, *elsewhere])

    def unlink_files(self) -> None:
        """Remove the engine's names from the file system, so that however this process ends, nothing is left."""
        queues = [path for process in self.processes for path in _SHM.glob(f"sgl_shm_*_{process.pid}_*")]
        for path in [*self.files, *queues]:
            path.unlink(missing_ok=True)
        self.files = []

    def stop(self) -> None:
        """Kill and reap the engine's processes and theirs."""
        started = [process for process in self.processes if process.pid is not None]
        family = [relative for process in started for relative in _family(process)]
        for relative in family:
            try:
                relative.kill()
            except psutil.NoSuchProcess:
                continue
        for process in started:
            process.join(_KILL_WAIT_S)
            if process.is_alive():
                raise EngineError(f"engine process {process.pid} did not end {_KILL_WAIT_S:.0f} s after SIGKILL")
        self.unlink_files()
        for process in started:
            process.close()
        for reader in self.readers:
            reader.close()
        self.processes, self.readers = [], []
        self._log.close()


@dataclass(slots=True)
class StartedEngine:
    """A running engine, its processes and what its schedulers reported."""

    engine: Engine
    children: ChildProcesses
    scheduler_info: dict[str, Any]
    previous_quit: Any
    """The SIGQUIT handler to put back once no child is left to send the signal."""


def start_engine(
    server_args: Mapping[str, Any],
    *,
    context: Nursery | SpawnContext,
    environment: Mapping[str, str],
    timeout_s: float,
    log_path: Path | None,
    during_start: Callable[[], None] | None,
    board: FailureBoard | None = None,
) -> StartedEngine:
    """Start SGLang's processes on this host and wait until the model stands.

    Args:
        context: what starts its processes.
        environment: variables for the engine's processes only.
        during_start: runs in this process while the children load; the time it takes does not count.
        board: of an engine that spans hosts.

    Raises:
        EngineError: the engine could not start, here or on another of its hosts; nothing is left behind.
    """
    processes = ChildProcesses(context, log_path, board)
    previous_quit = signal.getsignal(signal.SIGQUIT)
    try:
        with _trainer_environment({**environment, children.LOG_VARIABLE: str(processes.log_path)}) as restore:
            start = _Start(
                processes=processes, timeout_s=timeout_s, restore_environment=restore, during_start=during_start
            )
            engine = _construct(server_args, start)
    except BaseException as error:
        processes.stop()
        signal.signal(signal.SIGQUIT, previous_quit)
        if board is not None:
            board.post(f"engine failed to start: {type(error).__name__}: {error}")
        if isinstance(error, _DuringStartError):
            raise error.error from None
        if isinstance(error, Exception) and not isinstance(error, EngineError):
            raise EngineError(f"engine failed to start: {type(error).__name__}: {error}") from error
        raise
    if engine.tokenizer_manager is not None:
        engine.tokenizer_manager._subprocess_watchdog.stop()
    return StartedEngine(engine, processes, engine._scheduler_init_result.scheduler_infos[0], previous_quit)


class _DuringStartError(Exception):
    """Carries an error of the caller's own `during_start` past the engine's error handling."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(kw_only=True)
class _Start:
    """What SGLang's constructor needs of the one who starts an engine, and what is left of it if that fails."""

    processes: ChildProcesses
    timeout_s: float
    restore_environment: Callable[[], None]
    during_start: Callable[[], None] | None
    managers: list[Any] = field(default_factory=list)
    """Tokenizer managers that it has made."""

    def prepare(self) -> None:
        """While the children load."""
        self.restore_environment()
        if self.during_start is not None:
            try:
                self.during_start()
            except Exception as error:
                raise _DuringStartError(error) from error

    def make_manager(self, args: Any, ports: Any, *rest: Any) -> Any:
        """SGLang's tokenizer manager and templates."""
        self.prepare()
        manager, templates = init_tokenizer_manager(args, ports, *rest)
        self.managers.append(manager)
        return manager, templates

    def await_schedulers(self, args: Any, result: Any) -> None:
        """In place of SGLang's own wait, which does not notice children that die."""
        if args.node_rank > 0:
            # The engine's other hosts start no tokenizer manager.
            self.prepare()
        result.scheduler_infos.extend(self.processes.wait_ready(self.timeout_s))


def _engine_class(start: _Start) -> type[Engine]:
    """SGLang's engine with children that are watched here. It calls its hooks on the class."""

    class OwnedEngine(Engine):
        init_tokenizer_manager_func = staticmethod(start.make_manager)
        run_scheduler_process_func = staticmethod(children.run_scheduler)
        run_detokenizer_process_func = staticmethod(children.run_detokenizer)

        @classmethod
        def _launch_scheduler_processes(cls, args: Any, ports: Any, *rest: Any, **kwargs: Any) -> Any:
            start.processes.files += files_of(ports)
            # SGLang's handler, just installed, kills this process when a child reports a failure by SIGQUIT.
            signal.signal(signal.SIGQUIT, note_child_failure)
            result, started = super()._launch_scheduler_processes(args, ports, *rest, **kwargs)
            result.wait_for_ready = partial(start.await_schedulers, args, result)
            return result, started

        def shutdown(self) -> None:
            """Do nothing: SGLang's version kills every child of this process, the trainer's too."""

    return OwnedEngine


def _construct(server_args: Mapping[str, Any], start: _Start) -> Engine:
    with _replaced(sglang_engine, mp=start.processes, configure_logger=lambda *args, **kwargs: None):
        try:
            return _engine_class(start)(**server_args)
        except BaseException:
            for manager in start.managers:
                close_sockets(manager.recv_from_detokenizer)
            raise


def close_sockets(socket: Any) -> None:
    """Close a ZeroMQ socket and all of its context, and end the context's threads.

    Left to the garbage collector it would wait for ever: the processes that were to read what is queued are gone.
    """
    socket.context.destroy(linger=0)


def note_child_failure(signum: int, frame: Any) -> None:
    """A child reported a failure; whoever waits for it sees it end and says why."""


def cause_of(log: str) -> str:
    """The end of the first traceback in a log, or of the log if there is none.

    The first, because the other ranks of an engine follow with tracebacks of the connection they lost.
    """
    lines = [line[:_LINE_WIDTH] for line in log.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.endswith("Traceback (most recent call last):")]
    if starts:
        # A traceback ends with the first line that is not indented.
        ends = (index for index in range(starts[0] + 1, len(lines)) if not lines[index].startswith(" "))
        lines = lines[starts[0] : next(ends, len(lines)) + 1]
    return "\n".join(lines[-_TAIL_LINES:])


@contextmanager
def _trainer_environment(for_children: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """Set variables for the children; on exit the trainer's are back.

    The yielded function puts back all but SGLang's own (SGLANG_*), which its part in this process still reads; those
    that SGLang itself has set stay for good.
    """
    before = dict(os.environ)

    def restore(names: Iterable[str]) -> None:
        for name in names:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)

    def restore_foreign() -> None:
        restore([name for name in os.environ.keys() | before.keys() if not name.startswith("SGLANG_")])

    os.environ.update(for_children)
    try:
        yield restore_foreign
    finally:
        restore_foreign()
        restore(for_children)


@contextmanager
def _replaced(module: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _family(process: ChildProcess) -> list[psutil.Process]:
    try:
        itself = psutil.Process(process.pid)
        return [*itself.children(recursive=True), itself]
    except psutil.NoSuchProcess:
        return []


def files_of(ports: Any) -> list[Path]:
    """The sockets and the shared memory that SGLang makes for these ports."""
    addresses = [value for value in vars(ports).values() if isinstance(value, str) and value.startswith("ipc://")]
    sockets = [Path(address.removeprefix("ipc://")) for address in addresses]
    return [*sockets, Path(shm_path_for(ports.instance_id))]


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="mrl_engine_", suffix=".log")
    os.close(handle)
    return Path(name)
