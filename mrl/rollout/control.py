"""The message that has an engine take the actor's weights, and where the engines of several hosts meet for it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mrl.parallel.agreement import broadcast_result
from mrl.reshard.layout import SourceRank, sources_to_json
from mrl.reshard.spec import ModelSpec
from mrl.rollout.queue import job_store


class UpdateControl:
    """What `RolloutEngine.update_weights` takes on this rank. Built by all ranks.

    Args:
        sources: every trainer rank's export, in rank order.
        engine_sizes: ranks of every engine by its leader's rank, in rank order.
        rank: this trainer rank's.
        beside: of every engine rank, engine by engine, the trainer rank whose host and device it shares; None where
            it is the one of the engine's ranks in order.
        copy_engines: let copy engines bring what lies on other devices of an engine rank's host.
        timeout_s: longest exchange of weights between hosts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sources: Sequence[SourceRank],
        engine_sizes: Mapping[int, int],
        *,
        rank: int,
        beside: Sequence[int] | None = None,
        copy_engines: bool = False,
        timeout_s: float,
    ) -> None:
        if beside is None:
            beside = [leader + i for leader, size in engine_sizes.items() for i in range(size)]
        hosts = [sources[each].host for each in beside]
        self._store = job_store() if len(set(hosts)) > 1 else None
        self._name = broadcast_result(lambda: f"weights/{uuid.uuid4().hex}")
        self._renewals = -1
        self._timeout_s = timeout_s
        self._message: dict[str, Any] = {}
        if rank in engine_sizes:
            first = sum(size for leader, size in engine_sizes.items() if leader < rank)
            devices = [sources[each].device for each in beside]
            engines = {"hosts": hosts, "devices": devices, "first_rank": first, "copy_engines": copy_engines}
            self._message = {"spec": spec.to_json(), "sources": sources_to_json(sources), "engines": engines}
        self.renew()

    @property
    def message(self) -> Mapping[str, Any]:
        """The same object until `renew`; empty on ranks without an engine."""
        return self._message

    def renew(self) -> None:
        """Have all engines plan and meet anew: after a failed update or an engine's restart. Called by all ranks."""
        self._renewals += 1
        if not self._message:
            return
        engines = {**self._message["engines"], "renewals": self._renewals}
        if self._store is not None:
            engines["meeting"] = {
                "host": self._store.host,
                "port": self._store.port,
                "name": self._group_name,
                "timeout_s": self._timeout_s,
            }
        self._message = {**self._message, "engines": engines}

    def give_up(self, round_name: str, reason: str) -> None:
        """Have the engines of other hosts not wait for one that cannot take part in an update."""
        if self._store is not None:
            for key in ("verdict", "failure"):
                self._store.compare_set(f"{self._group_name}/{round_name}/{key}", "", reason)

    @property
    def _group_name(self) -> str:
        return f"{self._name}/{self._renewals}"
