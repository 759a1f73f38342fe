"""Forking the ranks of one host from a parent that has already imported everything.

Imports take far longer than a fork: 13 s for the whole stack against milliseconds. The parent must hold no thread and
no CUDA context when it forks.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from mrl.launch.addresses import LOOPBACK
from mrl.launch.board import is_echo
from mrl.launch.environment import RankEnvironment, host_environments
from mrl.launch.lifeline import die_with_parent
from mrl.launch.store import serve_store

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_S = 10.0
_SETTLE_S = 0.5

RankMain = Callable[[RankEnvironment], Any]


class RankFailure(RuntimeError):
    """A rank ended with an error or died; the message is the first failing rank's own."""

    def __init__(self, rank: int, message: str, *, user_error: bool, died: bool) -> None:
        super().__init__(message)
        self.rank = rank
        self.died = died
        """Whether it ended without a word."""
        self.user_error = user_error
        """True where the message alone tells a user what to do; a traceback would only hide it."""


@dataclass(slots=True)
class _Rank:
    number: int
    process: ForkProcess
    pipe: Connection
    outcome: tuple[str, Any] | None = None


def run_ranks(
    rank_main: RankMain,
    world_size: int,
    *,
    timeout_s: float | None = None,
    user_errors: tuple[type, ...] = (ValueError,),
) -> list[Any]:
    """Run `rank_main` in all `world_size` ranks of a job on this host; see `run_host_ranks`."""
    with serve_store(LOOPBACK) as port:
        environments = host_environments(num_nodes=1, ranks_per_node=world_size, master_addr=LOOPBACK, master_port=port)
        return run_host_ranks(rank_main, environments, timeout_s=timeout_s, user_errors=user_errors)


def run_host_ranks(
    rank_main: RankMain,
    environments: Sequence[RankEnvironment],
    *,
    timeout_s: float | None = None,
    user_errors: tuple[type, ...] = (ValueError,),
    on_failure: Callable[[RankFailure], None] | None = None,
) -> list[Any]:
    """Run `rank_main` in a forked process for each of this host's ranks and return their results in that order.

    When a rank fails, the others are stopped: SIGTERM, then SIGKILL after a grace period. SIGINT and SIGTERM to this
    process stop all of them too. No child outlives this call or this process.

    Args:
        on_failure: called with the failure before the other ranks are stopped.

    Raises:
        RankFailure: the first rank that failed, with its own error.
        TimeoutError: not all ranks ended in time.
        KeyboardInterrupt: this process was interrupted.
    """
    ranks: list[_Rank] = []
    with interrupt_on_sigterm():
        try:
            with _signals_held():
                for env in environments:
                    ranks.append(_fork(rank_main, env, user_errors))
            _collect(ranks, timeout_s)
        except RankFailure as failure:
            if on_failure is not None:
                on_failure(failure)
            raise
        finally:
            _stop(ranks)
    return [rank.outcome[1] for rank in ranks if rank.outcome is not None]


def _fork(rank_main: RankMain, env: RankEnvironment, user_errors: tuple[type, ...]) -> _Rank:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (rank_main, env, sender, user_errors, os.getpid())
    process = context.Process(target=_child, args=arguments, name=f"rank {env.rank}")
    process.start()
    sender.close()
    return _Rank(env.rank, process, receiver)


def _child(
    rank_main: RankMain, env: RankEnvironment, pipe: Connection, user_errors: tuple[type, ...], parent: int
) -> None:
    die_with_parent(parent)
    # What the parent imported stays for good: no collection has to walk it, nor write to the pages it shares.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    try:
        env.export()
        outcome = ("ok", rank_main(env))
    except SystemExit as stop:
        outcome = ("stopped", stop.code)
    except BaseException as error:
        known = isinstance(error, user_errors)
        outcome = ("user_error" if known else "error", str(error) if known else traceback.format_exc())
    pipe.send(outcome)
    pipe.close()
    logging.shutdown()
    # A normal interpreter exit would run the parent's atexit handlers and destructors in the child.
    os._exit(0 if outcome[0] == "ok" else 1)


def _exit_on_sigterm(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt, as SIGINT does, until the block ends."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delivers SIGINT and SIGTERM only at the end: between a fork and its record they would leave a rank unknown."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _collect(ranks: list[_Rank], timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), remaining)
        if not ready:
            late = sorted(rank.number for rank in waiting.values())
            raise TimeoutError(f"ranks {late} did not end within {timeout_s:.0f} s")
        failures = _receive_failures(ready, waiting)
        if failures:
            # A rank's end breaks the others' collectives at once; its own error may arrive after theirs.
            failures += _receive_failures(wait(list(waiting), _SETTLE_S) if waiting else [], waiting)
            raise min(failures, key=_blame)


def _receive_failures(ready: list[Any], waiting: dict[Connection, _Rank]) -> list[RankFailure]:
    failures = []
    for pipe in ready:
        rank = waiting.pop(pipe)
        rank.outcome = outcome = _receive(rank)
        if outcome[0] != "ok":
            failures.append(_failure(rank.number, *outcome))
    return failures


def _receive(rank: _Rank) -> tuple[str, Any]:
    try:
        return rank.pipe.recv()
    except EOFError:
        rank.process.join(_GRACE_S)
        return "died", rank.process.exitcode


def _failure(number: int, kind: str, detail: Any) -> RankFailure:
    if kind == "died":
        detail = f"rank {number} died with exit status {detail} (negative: killed by that signal)"
    elif kind == "stopped":
        detail = f"rank {number} was stopped (exit status {detail})"
    return RankFailure(number, str(detail), user_error=kind == "user_error", died=kind == "died")


def _blame(failure: RankFailure) -> tuple[bool, bool, int]:
    """Sorts the error that caused the others first: one meant for the user, then any but a broken connection."""
    return not failure.user_error, is_echo(str(failure)), failure.rank


def _stop(ranks: list[_Rank]) -> None:
    alive = [rank.process for rank in ranks if rank.process.is_alive() and rank.outcome is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.is_alive():
            logger.warning("%s did not stop within %.0f s and was killed", rank.process.name, _GRACE_S)
            rank.process.kill()
            rank.process.join()
        rank.pipe.close()
