"""One run at a time in a folder: a second one would take the first one's checkpoints for its own, or for remains."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_PATIENCE_S = 10.0
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def claim_run_folder(run_dir: Path, *, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Keep other runs out of `run_dir`, which is made if need be, until the block ends or this process does.

    The claim is the system's, so a run that was killed leaves none behind. Processes forked inside share it.

    Args:
        patience_s: how long to wait for a run that is about to end.

    Raises:
        ValueError: another run has the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _lock(descriptor, run_dir, patience_s)
        if locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            if locked:
                # Closing alone would leave it to forked processes that outlive this one.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path, patience_s: float) -> bool:
    """Whether the lock was taken; False on file systems that have none."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _BUSY:
                logger.warning("cannot tell whether another run uses %s: %s", run_dir, error)
                return False
        if time.monotonic() >= deadline:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace")
            raise ValueError(
                f"another run, {owner}, is writing to {run_dir}; stop it, or set trainer.default_local_dir to another "
                "folder"
            )
        time.sleep(0.1)
