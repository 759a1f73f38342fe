"""What the weight loader did in a scheduler process: handed to the hook that reports it, and read by the engine.

SGLang ignores a custom weight loader's return value, so it travels through this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrl.interfaces import EngineError, WeightUpdateReport
from mrl.reshard.errors import ReshardError
from mrl.reshard.peer_sums import PeerSums, check_peer_sums

_status: dict[str, Any] = {}


def put(**values: Any) -> None:
    """Add JSON-serialisable values to this process's status."""
    _status.update(values)


def take() -> dict[str, Any]:
    """The status so far; it is empty afterwards."""
    taken = dict(_status)
    _status.clear()
    return taken


def check_own_pairs(statuses: Sequence[Mapping[str, Any]]) -> None:
    """Raise EngineError unless what the engine's ranks read from each other's devices is what lies there."""
    try:
        check_peer_sums(_peer_sums(statuses), whole_job=False)
    except ReshardError as error:
        raise EngineError(str(error)) from error


def report_of(statuses: Sequence[Mapping[str, Any]], *, weight_version: int, call_s: float) -> WeightUpdateReport:
    """The report of an update that all of the engine's ranks have done."""
    totals = ("bytes", "local_bytes", "remote_bytes", "aliased_bytes", "ops")
    return WeightUpdateReport(
        **{name: sum(status[name] for status in statuses) for name in totals},
        weight_version=weight_version,
        pull_s=max(status["seconds"] for status in statuses),
        call_s=call_s,
        peer_sums=_peer_sums(statuses),
    )


def _peer_sums(statuses: Sequence[Mapping[str, Any]]) -> list[PeerSums]:
    return [PeerSums.from_json(status["peer_sums"]) for status in statuses]
