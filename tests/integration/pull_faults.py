"""A fault in the middle of a real engine's pull.

Engine processes that are forked inherit what `install` did to their parent. Spawned ones load it as one more plugin of
SGLang, from the path that they get from their parent. Which fault, and on which engine rank, stands in a file that each
pull looks for; a fault that happens removes it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

FAULT_VARIABLE = "MRL_TEST_PULL_FAULT"
REASON = "the memory of half a model is enough"
"""Of a refused pull."""

_GROUP = "sglang.srt.plugins"
_MRL_PLUGIN = "mrl_hooks"
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_DEATH_S = 60.0
_originals: list[Callable[[Any], Any]] = []


def install(folder: Path, fault: Path) -> None:
    """Have the engines of this process look for faults in the file `fault`; their plugin goes into `folder`."""
    write_plugin(folder)
    os.environ[FAULT_VARIABLE] = str(fault)
    sys.path.insert(0, str(folder))
    register()


def write_plugin(folder: Path) -> None:
    """Make `folder` one that `importlib.metadata` finds the plugin in, and mrl's own where mrl is not installed."""
    plugins = {"pull_faults": f"{__name__}:register"}
    if _MRL_PLUGIN not in {each.name for each in entry_points(group=_GROUP)}:
        plugins |= tomllib.loads(_PROJECT.read_text())["project"]["entry-points"][_GROUP]
    info = folder / "pull_faults-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pull-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{_GROUP}]", *(f"{k} = {v}" for k, v in plugins.items())]))


def require_plugins() -> None:
    """Raise RuntimeError unless SGLang would find mrl's plugin and this one in this process and those it spawns."""
    found = {each.name for each in entry_points(group=_GROUP)}
    if missing := {_MRL_PLUGIN, "pull_faults"} - found:
        raise RuntimeError(
            f"SGLang would not find {', '.join(sorted(missing))} among the entry points {_GROUP}, only "
            f"{', '.join(sorted(found)) or 'none'}; install mrl, or run in its checkout"
        )


def arm(fault: Path, *, engine_rank: int, kills: int | None) -> None:
    """Have the next pull of `engine_rank` end half way.

    Args:
        kills: process that gets SIGKILL then, 0 for the engine rank's own; None refuses the pull instead.
    """
    fault.write_text(json.dumps({"engine_rank": engine_rank, "kills": kills}))


def register() -> None:
    """Entry point: have pulls of this process and of those it forks look for a fault. Idempotent."""
    from mrl.reshard.execute import Puller

    if not _originals:
        _originals.append(Puller.pull)
        Puller.pull = _pull  # type: ignore[method-assign]


def _pull(puller: Any) -> Any:
    fault = _take(puller._plan.tp_rank)
    if fault is not None:
        _copy_half(puller._copies)
        if fault["kills"] is None:
            raise RuntimeError(REASON)
        _kill(fault["kills"] or os.getpid())
    return _originals[0](puller)


def _take(engine_rank: int) -> dict[str, Any] | None:
    path = Path(os.environ[FAULT_VARIABLE])
    if not path.exists():
        return None
    fault = json.loads(path.read_text())
    if fault["engine_rank"] != engine_rank:
        return None
    path.unlink()
    return fault


def _copy_half(copies: Any) -> None:
    """The first half of a plan's operations, or of its tiles; returns when the bytes are there."""
    import torch

    from mrl import ops
    from mrl.reshard.execute_torch import TorchCopies

    if isinstance(copies, TorchCopies):
        for target, source in copies._pairs[: len(copies._pairs) // 2]:
            target.copy_(source)
    else:
        ops.batched_strided_copy_checksum_(copies._token, copies._tiles[: len(copies._tiles) // 2])
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _kill(pid: int) -> None:
    """SIGKILL; returns when the process is dead, so that what follows happens after it."""
    watched = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    if not select.select([watched], [], [], _DEATH_S)[0]:
        raise RuntimeError(f"process {pid} was alive {_DEATH_S:.0f} s after SIGKILL")
    os.close(watched)
