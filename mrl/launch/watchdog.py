"""Deadlines of a run's phases, and what happens when one passes or a rank fails.

Each rank has a thread with its own connection to the job's store. It ends the rank when the rank's phase takes too
long, when another rank has announced that, or when another rank failed and this one still waits for it. Before that it
leaves there what this rank was doing, and one rank makes a report of it all.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrl.launch import hang_report
from mrl.launch.board import Failure, FailureBoard, PeerFailedError, is_echo, open_board
from mrl.launch.environment import RankEnvironment
from mrl.launch.stacks import current_collective, main_stack, other_stacks

logger = logging.getLogger(__name__)

HANG_STATUS = 75
"""Exit status of a rank that its watchdog ended."""
START = "start"
"""The phase a rank is in until the first other one."""

_POLL_S = 0.5
_REPORT_S = 4.0
"""How long ranks wait for the report beyond the time in which records are gathered."""
_STDERR = 2


@dataclass(kw_only=True, frozen=True)
class Patience:
    """How long processes wait for each other once something has gone wrong, in seconds."""

    gather_s: float = 5.0
    """A report, for what other ranks were doing."""
    peer_s: float = 10.0
    """A rank, for its own end, after another one failed; most find their connections broken at once."""
    echo_s: float = 3.0
    """An error that names no cause, for one that does."""
    stuck_s: float = 15.0
    """A process that cannot run its watchdog (stuck in C code with Python's lock), beyond its deadline."""


@dataclass(kw_only=True, frozen=True)
class Deadlines:
    """Longest time in a phase, in seconds."""

    default_s: float
    of_phase_s: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, phase: str) -> float:
        return self.of_phase_s.get(phase, self.default_s)

    @property
    def collective_s(self) -> float:
        """Longest wait in a collective: beyond any phase, since the watchdog knows more about what is missing."""
        return max([self.default_s, *self.of_phase_s.values()]) + 120.0


class Watchdog:
    """Watches one rank. Built before its threads start; watches from `start` to `close`.

    Args:
        run_dir: takes the report; its metrics.jsonl has the last metrics.
        user_errors: errors whose message alone tells a user what to do.
    """

    def __init__(
        self,
        env: RankEnvironment,
        deadlines: Deadlines,
        *,
        run_dir: Path,
        user_errors: tuple[type[BaseException], ...] = (ValueError,),
        patience: Patience | None = None,
    ) -> None:
        self.deadlines = deadlines
        self._env, self._run_dir = env, run_dir
        self._user_errors, self._patience = user_errors, patience or Patience()
        self._phase, self._since = START, time.monotonic()
        self._closing = threading.Event()
        self._board: FailureBoard | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; the job's store is there. The time until now does not count."""
        self._board = open_board(self._env)
        self._board.put(f"process/{self._env.rank}", hang_report.describe_process())
        self.enter(START)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """This rank begins a phase, or goes back to the one around it; its time starts at zero."""
        self._phase, self._since = phase, time.monotonic()
        if self._board is not None:
            faulthandler.dump_traceback_later(self.deadlines[phase] + self._patience.stuck_s, exit=True, file=_STDERR)

    def close(self) -> None:
        """Watch no longer; idempotent."""
        faulthandler.cancel_dump_traceback_later()
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_POLL_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the others of an error before this rank's end breaks their connections.

        Raises:
            PeerFailedError: the error follows from another rank's.
        """
        if isinstance(error, Exception) and self._board is not None:
            failure = self._publish(error)
            self.close()
            if failure is not None and failure.rank != self._env.rank:
                raise PeerFailedError(str(failure)) from error
        self.close()

    def _publish(self, error: Exception) -> Failure | None:
        known = isinstance(error, self._user_errors)
        text = str(error) if known else "".join(traceback.format_exception(error))
        mine = Failure(rank=self._env.rank, kind="error", message=text, user_error=known)
        assert self._board is not None
        try:
            if is_echo(text) and (first := self._board.first(wait_s=self._patience.echo_s)):
                return first
            return self._board.publish(mine)
        except RuntimeError:
            # The store went away with host 0: nobody is left to tell.
            return None

    def _watch(self) -> None:
        assert self._board is not None
        while not self._closing.wait(_POLL_S):
            try:
                failure = self._board.first()
                if failure is None and (late := self._late()):
                    failure = self._board.publish(late)
                if failure is not None:
                    self._end_with(failure, self._board)
            except RuntimeError as error:
                self._end_alone(error)

    def _late(self) -> Failure | None:
        phase, seconds = self._phase, time.monotonic() - self._since
        limit = self.deadlines[phase]
        if seconds <= limit:
            return None
        return Failure(rank=self._env.rank, kind="hang", message=f"phase {phase} took longer than {limit:.0f} s")

    def _end_with(self, failure: Failure, board: FailureBoard) -> None:
        if failure.kind == "hang":
            board.put(f"record/{self._env.rank}", self._record())
            self._report(failure, board)
            hang_report.kill_silent(board, self._env)
        elif self._closing.wait(self._patience.peer_s):
            return
        else:
            logger.error("rank %d still waited in phase %s for rank %d", self._env.rank, self._phase, failure.rank)
        self._leave()

    def _record(self) -> dict[str, Any]:
        return {
            "rank": self._env.rank,
            "host": socket.gethostname(),
            "phase": self._phase,
            "seconds": time.monotonic() - self._since,
            "collective": current_collective(),
            "stack": main_stack(),
            "threads": other_stacks(),
        }

    def _report(self, failure: Failure, board: FailureBoard) -> None:
        """Rank 0 writes it; if that cannot, the rank that noticed the hang does."""
        writers, gather_s = [0, failure.rank] if failure.rank else [0], self._patience.gather_s
        for turn, writer in enumerate(writers):
            if writer == self._env.rank:
                if turn == 0 or board.get("reported") is None:
                    path = hang_report.write_report(failure, board, self._env, run_dir=self._run_dir, wait_s=gather_s)
                    board.put("reported", str(path))
                return
            if self._wait_for("reported", board, gather_s + _REPORT_S):
                return

    def _wait_for(self, name: str, board: FailureBoard, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while board.get(name) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _end_alone(self, error: RuntimeError) -> None:
        """The store is gone, and with it host 0: give the processes of this host a moment to end by themselves."""
        if self._closing.wait(self._patience.peer_s):
            return
        logger.error(
            "rank %d: the job's store at %s does not answer (%s): host 0 has ended or cannot be reached; this rank was "
            "in phase %s for %.0f s%s",
            self._env.rank,
            self._env.master_addr,
            str(error).splitlines()[0],
            self._phase,
            time.monotonic() - self._since,
            f", in {collective}" if (collective := current_collective()) else "",
        )
        self._leave()

    def _leave(self) -> None:
        logging.shutdown()
        os._exit(HANG_STATUS)
