"""An engine's processes on a host that is not the engine's first: started, watched, stopped, never called."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.launch import ChildProcesses
from mrl.backends.sglang.parts import EnginePart, FailureBoard
from mrl.backends.sglang.supervisor import EngineSupervisor


class EngineFollower:
    """Part of an engine. Its processes take the engine's requests from those of the first host.

    When one of them ends, the leader is told: its own call might otherwise wait for an answer until the deadline.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self._supervisor = supervisor
        self._owner_pid = os.getpid()
        self._watch: _Watch | None = None

    @classmethod
    def start(
        cls,
        settings: EngineSettings,
        *,
        part: EnginePart,
        start_timeout_s: float,
        log_path: Path | None = None,
        during_start: Callable[[], None] | None = None,
    ) -> EngineFollower:
        """Start this part's processes; returns once they have loaded, as all other parts' have by then.

        On CPU the processes are forked, under the same conditions as `SGLangEngine.start` names.

        Args:
            during_start: runs in this process while the children load.

        Raises:
            ValueError: arguments SGLang would accept and then go wrong with.
            EngineError: this part or another did not start.
        """
        supervisor = EngineSupervisor(
            settings.engine_args(part),
            forks=settings.device == "cpu",
            part=part,
            environment=settings.environment(),
            start_timeout_s=start_timeout_s,
            call_timeout_s=start_timeout_s,
            log_path=log_path,
        )
        follower = cls(supervisor)
        atexit.register(follower.shutdown)
        try:
            follower._start(during_start)
        except BaseException:
            follower.shutdown()
            raise
        return follower

    def restart(self) -> None:
        """Replace this part's processes; all parts of the engine do it at once.

        Raises:
            EngineError: this part or another did not start.
        """
        self._stop_watch()
        self._supervisor.stop()
        self._start(None)

    def shutdown(self) -> None:
        """Kill and reap this part's processes; idempotent."""
        if os.getpid() != self._owner_pid:
            return
        atexit.unregister(self.shutdown)
        self._stop_watch()
        self._supervisor.close()

    def _start(self, during_start: Callable[[], None] | None) -> None:
        self._supervisor.start(during_start)
        board = self._supervisor.board
        assert board is not None, "a part that does not lead belongs to an engine of several hosts"
        self._watch = _Watch(self._supervisor.children, board)

    def _stop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()


class _Watch:
    """A thread that posts the first end of one of the processes: their owner waits in a collective meanwhile."""

    def __init__(self, children: ChildProcesses, board: FailureBoard) -> None:
        reader, self._stop_writer = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=_watch, args=(children, board, reader), name="engine watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop_writer.close()
        self._thread.join()


def _watch(children: ChildProcesses, board: FailureBoard, stop_reader: Connection) -> None:
    with stop_reader:
        wait([stop_reader, *(process.sentinel for process in children.processes)])
        if dead := children.dead():
            board.post(children.explain(f"engine died ({'; '.join(dead)})"))
