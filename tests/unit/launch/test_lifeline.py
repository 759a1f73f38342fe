"""Processes end with the one that forked them, also where that one is gone before they could ask for it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from mrl.launch.lifeline import die_with_parent

_LONG_S = 60.0


def fork(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and exits, whatever happens in it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_a_process_dies_with_its_parent() -> None:
    ready, alive = os.pipe(), os.pipe()

    def grandchild(parent: int) -> None:
        os.close(alive[0])
        die_with_parent(parent)
        os.write(ready[1], b"x")
        time.sleep(_LONG_S)

    def child() -> None:
        own = os.getpid()
        fork(lambda: grandchild(own))
        time.sleep(_LONG_S)

    pid = fork(child)
    os.close(alive[1])
    assert os.read(ready[0], 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # Both held the pipe's other end: it closes when both are gone.
    assert select.select([alive[0]], [], [], _LONG_S / 2)[0]
    assert os.read(alive[0], 1) == b""
    for fd in (*ready, alive[0]):
        os.close(fd)


def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    other = os.getppid()
    pid = fork(lambda: (die_with_parent(other), time.sleep(_LONG_S)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
