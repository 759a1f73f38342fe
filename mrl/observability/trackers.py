"""Where the metrics of a run go: a JSON-lines file, tensorboard, Weights & Biases, the console."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

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


class WandbTracker:
    """A run on Weights & Biases; a run that goes on from a checkpoint goes on there, too.

    Raises:
        ValueError: nobody is logged in, or the service does not answer.
    """

    def __init__(
        self, run_dir: Path, *, project: str, experiment: str, settings: Mapping[str, Any], goes_on: bool
    ) -> None:
        # Not at file top: it is optional, and takes a second.
        import wandb

        identity = run_dir / "wandb_id"
        if not (goes_on and identity.is_file()):
            identity.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=experiment,
                config=dict(settings),
                dir=str(run_dir),
                id=identity.read_text(),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
            # Its own steps only grow: what a run logs that went back to an older checkpoint would be thrown away.
            self._run.define_metric("*", step_metric="step")
        except wandb.Error as error:
            raise ValueError(
                f"trainer.logger names wandb, which does not start: {error}. Log in (`wandb login` or WANDB_API_KEY), "
                "set WANDB_MODE=offline, or leave it out"
            ) from error

    def log(self, metrics: Metrics, *, step: int) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


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


def build_trackers(
    names: Sequence[str],
    *,
    run_dir: Path,
    total_steps: int,
    project: str = "",
    experiment: str = "",
    settings: Mapping[str, Any] | None = None,
) -> TrackerList:
    """The JSON-lines tracker, always, and those named: "console", "tensorboard", "wandb" ("file" is the first one).

    Args:
        settings: the run's configuration, for the trackers that keep it.

    Raises:
        ValueError: a name that is none of these.
    """
    history = run_dir / "metrics.jsonl"
    goes_on = history.is_file() and history.stat().st_size > 0
    trackers: list[Tracker] = [JsonLinesTracker(history)]
    for name in dict.fromkeys(names):
        if name == "console":
            trackers.append(ConsoleTracker(total_steps=total_steps))
        elif name == "tensorboard":
            trackers.append(TensorboardTracker(run_dir / "tensorboard"))
        elif name == "wandb":
            trackers.append(
                WandbTracker(run_dir, project=project, experiment=experiment, settings=settings or {}, goes_on=goes_on)
            )
        elif name != "file":
            raise ValueError(f"trainer.logger names {name!r}; known are console, tensorboard, wandb and file")
    return TrackerList(trackers)
