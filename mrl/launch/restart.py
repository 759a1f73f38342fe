"""Starting a job's ranks again, from its last checkpoint, when they died or hang."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mrl.launch.board import Failure, FailureBoard, is_echo, open_board
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import RankFailure, RankMain, run_host_ranks

logger = logging.getLogger(__name__)

_ECHO_S = 5.0


class RunFailed(RuntimeError):
    """The job ended with a failure and is not started again; the message names the rank."""


def run_with_restarts(
    build: Callable[[], RankMain],
    ranks: Sequence[RankEnvironment],
    *,
    max_restarts: int,
    user_errors: tuple[type, ...],
) -> list[Any]:
    """Results of this host's ranks, started up to 1 + `max_restarts` times. Called by every host's task.

    All hosts see the same failure, so they start again together: the ranks of an attempt meet under its number.

    Args:
        build: called before each attempt; what each rank runs in it.

    Raises:
        RunFailed: a failure that a restart would not mend, or one too many.
        KeyboardInterrupt: this process was interrupted.
    """
    for attempt in range(max_restarts + 1):
        environments = [replace(env, attempt=attempt) for env in ranks]
        rank_main = build()
        causes: list[Failure] = []
        try:
            return run_host_ranks(
                rank_main,
                environments,
                user_errors=user_errors,
                on_failure=partial(_agree, environments[0], causes),
            )
        except RankFailure:
            [cause] = causes
            if cause.user_error or attempt == max_restarts:
                raise RunFailed(str(cause)) from None
            logger.error("%s", cause)
            logger.warning("restart %d of %d, from the last checkpoint", attempt + 1, max_restarts)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _agree(env: RankEnvironment, causes: list[Failure], failure: RankFailure) -> None:
    """Append the job's failure: the first that any host or rank published, or this one."""
    mine = Failure(
        rank=failure.rank,
        kind="died" if failure.died else "error",
        message=str(failure),
        user_error=failure.user_error,
    )
    try:
        causes.append(_publish(open_board(env), mine))
    except (RuntimeError, ValueError):
        # The store went away with host 0: there is nobody to start again with.
        causes.append(replace(mine, message=f"{mine.message}; host 0 cannot be asked why", user_error=True))


def _publish(board: FailureBoard, mine: Failure) -> Failure:
    if is_echo(mine.message) and (first := board.first(wait_s=_ECHO_S)):
        return first
    return board.publish(mine)
