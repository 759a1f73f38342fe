"""A pipe whose closing ends a process, so that nothing outlives who started it, however that one ended."""

from __future__ import annotations

import fcntl
import os
import select
import sys


def end_with_parent(lifeline: int) -> None:
    """End this process as soon as nobody holds the pipe's other end, or now.

    SIGIO's default action ends the process, also while it hangs in C code. Unlike a parent-death signal this follows a
    process and not the thread that forked.

    Args:
        lifeline: reading end of a pipe whose writing end only the parent holds.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit("the parent process is gone")
