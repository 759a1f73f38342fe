"""Progress bars that count bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]


class Track(Protocol):
    """Opens a bar of a number of bytes; yields what is called with each number of bytes done."""

    def __call__(self, what: str, num_bytes: int) -> AbstractContextManager[Advance]: ...


@contextmanager
def progress_bar(what: str, num_bytes: int) -> Iterator[Advance]:
    """A bar on the terminal's error stream; elsewhere one line at the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda count: progress.advance(task, count)


@contextmanager
def no_progress(what: str, num_bytes: int) -> Iterator[Advance]:
    """Nothing is shown."""
    yield lambda count: None
