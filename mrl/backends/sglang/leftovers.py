"""Files that a process wants gone when it has ended, however it ends."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Leftovers:
    """Removes paths once this process and those it forks have ended.

    SGLang's server ends itself by SIGKILL, so nothing in it can clean up; and it kills every process that descends
    from it, so what cleans up has to be nobody's child.
    """

    def __init__(self) -> None:
        names, self._names = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(self._names)
            os.setsid()
            if os.fork() == 0:
                _remove_at_end(names)
            os._exit(0)
        os.close(names)
        os.waitpid(child, 0)

    def add(self, path: Path) -> None:
        """Have a file or a folder removed at the end; it need not exist."""
        os.write(self._names, os.fsencode(path) + b"\0")


def _remove_at_end(names: int) -> None:
    """Remove what the pipe names when its last writer has ended, and end."""
    try:
        with os.fdopen(names, "rb") as pipe:
            paths = [Path(os.fsdecode(name)) for name in pipe.read().split(b"\0") if name]
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os._exit(0)
