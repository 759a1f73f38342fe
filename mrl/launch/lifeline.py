"""What ends a process with the one that started it, however that one ended."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when the thread that forked it ends; called first thing after the fork.

    Args:
        parent: process that forked this one, which ends at once if that is gone already; None where it has no number
            here, in another process namespace.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


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
