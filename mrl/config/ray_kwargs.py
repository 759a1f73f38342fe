"""Settings of Ray: section `ray_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mrl.config.frozen import FrozenDict
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class RayKwargsConfig(Section):
    """How the job joins a Ray cluster, where `trainer.launcher` is ray."""

    ray_init: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Arguments of `ray.init`, such as `address`, `runtime_env`, or `num_cpus` of a cluster that is started here; null
    ones are left out."""
    timeline_json_file: str | None = None
    """File for Ray's own timeline of the job, in the format of chrome://tracing; null writes none."""
