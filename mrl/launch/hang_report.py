"""The one report of a run that hangs: who waits where, who is missing, and what everybody was doing."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrl.launch.board import Failure, FailureBoard
from mrl.launch.environment import RankEnvironment

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHOWN_RANKS = 64
_STOPPED = ("T", "t", "Z", "X")
"""State letters of processes that run no more, unless somebody lets them."""

Record = Mapping[str, Any]


def describe_process() -> dict[str, Any]:
    """What tells this process from any other, now or later, on this or another machine."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _status_of(os.getpid())[1]}


def write_report(
    failure: Failure, board: FailureBoard, env: RankEnvironment, *, run_dir: Path, wait_s: float
) -> Path | None:
    """Gather what ranks left, for at most `wait_s`; log the report and write it to the run's folder.

    Returns its path, None if it could only be logged.
    """
    records = _gather(board, env.world_size, wait_s)
    silent = {rank: _state_of(board.get(f"process/{rank}")) for rank in range(env.world_size) if rank not in records}
    summary = format_summary(failure, records, silent)
    text = "\n".join([summary, f"last metrics: {_last_line(run_dir / 'metrics.jsonl')}", format_stacks(records)])
    path = run_dir / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.error("%s\n(not written to %s: %s)", text, path, error)
        return None
    logger.error("%s\nstacks and last metrics are in %s", summary, path)
    return path


def format_summary(failure: Failure, records: Mapping[int, Record], silent: Mapping[int, str]) -> str:
    """Who did not come, who waits, and where.

    Args:
        records: by rank, of the ranks that answered.
        silent: by rank, of those that did not: what the system says of them.
    """
    waiting = {rank: record for rank, record in records.items() if record["collective"]}
    busy = {rank: record for rank, record in records.items() if not record["collective"]}
    lines = [f"the run hangs: {failure.message} on rank {failure.rank}"]
    lines += [f"  rank {rank} is silent: {state}" for rank, state in sorted(silent.items())]
    lines += [f"  {_who(ranks)} not in a collective: {where}" for where, ranks in _grouped(busy, _place)]
    lines += [f"  {_who(ranks)} waiting in {where}" for where, ranks in _grouped(waiting, _place)]
    return "\n".join(lines)


def format_stacks(records: Mapping[int, Record]) -> str:
    """What ranks were doing; those with the same stack are shown once."""
    lines = []
    for stack, ranks in _grouped(records, _stack):
        first = records[ranks[0]]
        lines += [f"{_names(ranks)}: phase {first['phase']} for {first['seconds']:.0f} s, host {first['host']}", stack]
        for name, frames in first["threads"].items():
            lines += [f"  thread {name}:", *(f"    {line}" for line in frames[-3:])]
    return "\n".join(lines)


def kill_silent(board: FailureBoard, env: RankEnvironment) -> None:
    """Kill this machine's ranks that left no record: stopped or stuck, they would not end by themselves."""
    first = env.node_rank * env.local_world_size
    for rank in range(first, first + env.local_world_size):
        process = board.get(f"process/{rank}")
        if process is None or board.get(f"record/{rank}") is not None or process["machine"] != _machine():
            continue
        if _status_of(process["pid"])[1] == process["started"]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process["pid"], signal.SIGKILL)


def _gather(board: FailureBoard, world_size: int, wait_s: float) -> dict[int, Record]:
    records: dict[int, Record] = {}
    deadline = time.monotonic() + wait_s
    while True:
        missing = [rank for rank in range(world_size) if rank not in records]
        records |= {rank: record for rank in missing if (record := board.get(f"record/{rank}")) is not None}
        waited_for = [rank for rank in missing if rank not in records and _may_answer(board.get(f"process/{rank}"))]
        if not waited_for or time.monotonic() > deadline:
            return records
        time.sleep(_POLL_S)


def _grouped(records: Mapping[int, Record], key: Any) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, record in sorted(records.items()):
        groups[key(record)].append(rank)
    return sorted(groups.items(), key=lambda group: group[1])


def _place(record: Record) -> str:
    where = record["collective"] or (record["stack"][-1] if record["stack"] else "an unknown place")
    return f"{where} (phase {record['phase']})"


def _stack(record: Record) -> str:
    return "\n".join(f"    {line}" for line in record["stack"])


def _who(ranks: Sequence[int]) -> str:
    return _names(ranks) + (" is" if len(ranks) == 1 else " are")


def _names(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def _state_of(process: Mapping[str, Any] | None) -> str:
    """What can be said, from here, of a rank that does not answer."""
    if process is None:
        return "it has not started to watch"
    if process["machine"] != _machine():
        return "its process, or its host, does not answer"
    state, started = _status_of(process["pid"])
    if started != process["started"]:
        return f"process {process['pid']} is gone"
    if state in _STOPPED:
        return f"process {process['pid']} is stopped (a signal or a debugger); SIGCONT lets it go on"
    return f"process {process['pid']} (state {state}) does not run Python: it is stuck in native code or in the system"


def _may_answer(process: Mapping[str, Any] | None) -> bool:
    if process is None or process["machine"] != _machine():
        return True
    state, started = _status_of(process["pid"])
    return started == process["started"] and state not in _STOPPED


def _status_of(pid: int) -> tuple[str, str]:
    """A process's state letter and start time in ticks; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _machine() -> str:
    """Of the processes that share process ids with this one."""
    return f"{_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
