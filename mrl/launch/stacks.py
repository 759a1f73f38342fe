"""What the threads of this process are doing, for a report that people read."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_DEPTH = 40


def main_stack() -> list[str]:
    """The main thread's frames, outermost first: `file:line function: source line`."""
    return _lines(sys._current_frames()[threading.main_thread().ident or 0])


def other_stacks() -> dict[str, list[str]]:
    """The same for the threads that Python knows besides the main one and this one, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    skipped = (threading.main_thread().ident, threading.get_ident())
    frames = sys._current_frames().items()
    return {f"{names.get(ident, ident)}": _lines(frame) for ident, frame in frames if ident not in skipped}


def current_collective() -> str | None:
    """The function of torch.distributed that the main thread is in, and who called it; None if it is in none."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    found = None
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_COLLECTIVES):
            found = code.co_name
        elif found is not None and "torch/distributed" not in code.co_filename:
            return f"{found}, called by {_short(code.co_filename)}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return found


def _lines(frame: FrameType) -> list[str]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_DEPTH)
    return [f"{_short(each.filename)}:{each.lineno} {each.name}: {each.line}" for each in reversed(summary)]


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-3:])
