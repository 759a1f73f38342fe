"""A host's task on Ray: the program that `mrl.launch.ray_host` starts."""

from __future__ import annotations

import json
import logging
import os
import select
import sys

from mrl.launch.lifeline import end_with_parent

_PIPE_BYTES = 1 << 16
_MOST_CHARACTERS = 8192
"""Of an error; at six bytes each still less than a pipe holds, so that writing never waits for a reader."""


class ErrorRecorder(logging.Handler):
    """Keeps the last error that the package has logged, which is the one that ends a run."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.error = record.getMessage()


def main(report: int) -> int:
    """Run the host's ranks as configured on standard input; returns the exit status.

    Args:
        report: descriptor of a pipe for the error, if there is one.
    """
    config_text = read_config()
    end_with_parent(sys.stdin.fileno())
    recorder = ErrorRecorder()
    logging.getLogger("mrl").addHandler(recorder)
    status = _run(config_text)
    if status:
        os.write(report, json.dumps((recorder.error or "")[:_MOST_CHARACTERS]).encode())
    return status


def read_report(descriptor: int) -> str | None:
    """What `main` wrote, without waiting: None if it ended before it could, or knew of no error."""
    readable = select.select([descriptor], [], [], 0)[0]
    content = os.read(descriptor, _PIPE_BYTES) if readable else b""
    return (json.loads(content) or None) if content else None


def read_config() -> str:
    """The configuration; it follows a line with its length, for the pipe stays open behind it."""
    size = int(sys.stdin.buffer.readline())
    return sys.stdin.buffer.read(size).decode()


def _run(config_text: str) -> int:
    # Imported late: an actor, which imports this module too, needs none of it.
    from mrl.config.load import parse_config
    from mrl.launch.run import launch
    from mrl.observability.console import setup_logging

    setup_logging(rank=0)
    return launch(parse_config(config_text))
