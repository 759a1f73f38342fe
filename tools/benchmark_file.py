"""The one format of benchmark results: rows of a value, the bound that the same run measured, and how close it came."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch


@dataclass(kw_only=True, frozen=True)
class Row:
    """One measured number."""

    case: str
    metric: str
    value: float
    unit: str
    limit: float | None = None
    """The bound, in the same unit, measured in the same run or computed from what it measured."""
    ratio: float | None = None
    """How close the value is to the limit; 1 is at it, higher is better."""
    peers: Mapping[str, float] = field(default_factory=dict)
    """The other ways' values in the same run."""

    def __str__(self) -> str:
        bound = "" if self.limit is None else f"  limit {self.limit:10.3f}  ratio {self.ratio:.3f}"
        peers = "".join(f"  {name} {value:.3f}" for name, value in self.peers.items())
        return f"{self.case:34s} {self.metric:22s} {self.value:10.3f} {self.unit}{bound}{peers}"


def timed_row(case: str, metric: str, value_ms: float, limit_ms: float, **peers: float) -> Row:
    """A time with the least time that it could take; both in ms."""
    ratio = limit_ms / value_ms
    return Row(case=case, metric=metric, value=value_ms, unit="ms", limit=limit_ms, ratio=ratio, peers=peers)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of what decides the speed; what is not installed is said to be missing."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(path: Path, name: str, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    """Write the rows with hardware, versions and the command that is running."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    result = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{len(devices)} x {devices[0]}" if devices else platform.processor() or platform.machine(),
        "versions": dict(versions),
        "command": " ".join(["python", *sys.argv]),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
