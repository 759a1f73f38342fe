"""What a person at the terminal sees: log lines, one line per step under a progress bar, a table at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

CONSOLE = Console(stderr=False)

_STEP_COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("kl", "actor/kl", "{:.4f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("clip", "actor/clip_fraction", "{:.3f}"),
    ("ev", "critic/explained_variance", "{:.2f}"),
    ("parity", "parity/log_prob_abs_diff_mean", "{:.1e}"),
    ("tok/s", "rollout/tokens_per_s", "{:.0f}"),
    ("reshard", "time/reshard_s", "{:.3f}s"),
    ("step", "time/step_s", "{:.2f}s"),
    ("val", "val/reward_mean", "{:.3f}"),
)


def setup_logging(*, rank: int) -> None:
    """INFO on rank 0, warnings elsewhere, through rich; replaces existing root handlers."""
    handler = RichHandler(console=CONSOLE, show_path=False, rich_tracebacks=False, log_time_format="%H:%M:%S")
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mrl").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def format_step(metrics: Mapping[str, float], *, step: int, total_steps: int) -> str:
    """One line with the numbers a person watches; metrics that are absent are left out."""
    cells = [f"{label} {form.format(metrics[key])}" for label, key, form in _STEP_COLUMNS if key in metrics]
    return f"step {step}/{total_steps}  " + "  ".join(cells)


class ConsoleTracker:
    """A progress bar with one line per step above it."""

    def __init__(self, *, total_steps: int) -> None:
        self._total_steps = total_steps
        self._progress = Progress(
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=CONSOLE,
        )
        self._task = self._progress.add_task("steps", total=total_steps)
        self._progress.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        line = format_step(metrics, step=step, total_steps=self._total_steps)
        self._progress.console.print(line, highlight=True, soft_wrap=True)
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        self._progress.stop()


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A two-column table on the console."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    CONSOLE.print(table)
