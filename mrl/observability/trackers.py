"""Where the metrics of a run go: a JSON-lines file, tensorboard, the console."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from torch.utils.tensorboard import SummaryWriter

from mrl.observability.console import ConsoleTracker

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """Receives one dictionary of scalars per step."""

    def log(self, metrics: Metrics, *, step: int) -> None: ...

    def close(self) -> None: ...


class JsonLinesTracker:
    """One JSON object per step in `metrics.jsonl`, flushed at once so that a killed run keeps its history."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, *, step: int) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorboardTracker:
    """Scalars as tensorboard events."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Metrics, *, step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackerList:
    """Hands every call to each of its trackers; empty on ranks that do not log."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, metrics: Metrics, *, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def build_trackers(names: Sequence[str], *, run_dir: Path, total_steps: int) -> TrackerList:
    """The JSON-lines tracker, always, and those named: "console", "tensorboard" ("file" is the JSON-lines one).

    Raises:
        ValueError: a name that is none of these.
    """
    trackers: list[Tracker] = [JsonLinesTracker(run_dir / "metrics.jsonl")]
    for name in dict.fromkeys(names):
        if name == "console":
            trackers.append(ConsoleTracker(total_steps=total_steps))
        elif name == "tensorboard":
            trackers.append(TensorboardTracker(run_dir / "tensorboard"))
        elif name != "file":
            raise ValueError(f"trainer.logger names {name!r}; known are console, tensorboard and file")
    return TrackerList(trackers)
