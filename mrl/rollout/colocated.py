"""Rollout engines that live on the trainer's own ranks.

Engine e of size T lives on ranks e T .. e T + T - 1; the first of them, its leader, owns it and the others wait. Every
method is called by all ranks with the same arguments and returns the same on all of them. When any engine fails, all
ranks raise the same EngineError. An engine that dies is restarted, a bounded number of times: it gets the weights of
the current version again, and all engines share the prompts that it had not finished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist

from mrl.interfaces import EngineDiedError, EngineError, RolloutEngine, TakePrompts, WeightUpdateReport, update_round
from mrl.parallel.agreement import gather_results
from mrl.reshard.errors import ReshardError
from mrl.reshard.layout import SourceRank
from mrl.reshard.peer_sums import check_peer_sums
from mrl.reshard.spec import ModelSpec
from mrl.rollout.control import UpdateControl
from mrl.rollout.exchange import GenerationExchange
from mrl.rollout.queue import SharedQueue, open_store
from mrl.types import Generation, Prompt, Sample, SamplingParams

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class StreamingEngine(RolloutEngine, Protocol):
    """A rollout engine that can also take its prompts from a queue as slots become free."""

    @property
    def tp_size(self) -> int:
        """Ranks that it lives on, its owner's first."""
        ...

    def generate_from(self, take: TakePrompts, params: SamplingParams, *, window: int) -> dict[int, Generation]:
        """Responses by index, for prompts that `take(free slots)` hands out until it returns none."""
        ...


class Follower(Protocol):
    """An engine's processes on a host that is not its first; requests reach them by themselves."""

    def restart(self) -> None:
        """Replace them, while the engine's other parts do so, too."""
        ...

    def shutdown(self) -> None:
        """Stop them; idempotent."""
        ...


@dataclass(kw_only=True, frozen=True)
class _Death:
    """An engine died; `rank` led it."""

    rank: int
    reason: str


@dataclass(kw_only=True, frozen=True)
class _Refusal:
    """An engine that lives failed to update; `rank` led it."""

    rank: int
    reason: str


class ColocatedRollout:
    """Implements `mrl.interfaces.Rollout`. Built by all ranks; the default process group carries CPU tensors.

    Args:
        engine: this rank's engine where the rank is a leader, None elsewhere.
        follower: this rank's part of an engine that spans hosts, where it is the first on a host but not the leader.
        spec: the actor's model.
        source: what this rank exports of the actor's weights; its buffers never move.
        max_running_requests: most prompts one engine has in flight.
        max_engine_restarts: most times that engines are restarted over the whole run; after that, a death is an error.
        weight_version: version of the first update; each later one adds 1.
        beside: of every engine rank, engine by engine, the trainer rank whose GPU it runs on; None where they are in
            order.
        copy_engines: let copy engines bring weights that lie on other devices of an engine rank's host.
        reshard_timeout_s: longest exchange of weights between hosts in one update.
        make_room: gives what this rank has freed back to its device; called before engines are restarted, which look
            for what is free when they start.

    Raises:
        ValueError: no rank has an engine.
    """

    def __init__(
        self,
        engine: StreamingEngine | None,
        *,
        follower: Follower | None = None,
        spec: ModelSpec,
        source: SourceRank,
        max_running_requests: int = 256,
        max_engine_restarts: int = 0,
        weight_version: int = 0,
        beside: Sequence[int] | None = None,
        copy_engines: bool = False,
        reshard_timeout_s: float = 600.0,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._make_room = make_room
        self._follower = follower
        initialized = dist.is_initialized()
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        self._window = max_running_requests
        self._max_restarts = max_engine_restarts
        self._restarts = 0
        self._reported_restarts = 0
        self._next_version = weight_version
        self._rounds = 0
        sizes, sources = zip(*gather_results(lambda: (engine.tp_size if engine else 0, source)), strict=True)
        self._leaders = [rank for rank, size in enumerate(sizes) if size]
        if not self._leaders:
            raise ValueError("no rank owns a rollout engine; start one on the first rank of each engine")
        engine_sizes = {leader: sizes[leader] for leader in self._leaders}
        self._control = UpdateControl(
            spec,
            sources,
            engine_sizes,
            rank=self._rank,
            beside=beside,
            copy_engines=copy_engines,
            timeout_s=reshard_timeout_s,
        )
        self._exchange = GenerationExchange([each.host for each in sources], spec, rank=self._rank)
        self._store = open_store()
        self.metrics: dict[str, float] = {}
        """Of the last `generate`; `rollout/engine_s` is the time until all engines were done."""

    @property
    def weight_version(self) -> int:
        """Version of the engines' weights; one less than the first before any update."""
        return self._next_version - 1

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """One sample for each prompt, in order, on every rank; `response_text` is left empty.

        Raises:
            EngineError: any engine failed, or died and may not be restarted.
            ValueError: sampling parameters or prompts that an engine refuses.
        """
        begin, engine_s = time.perf_counter(), 0.0
        generations: dict[int, Generation] = {}
        while missing := [index for index in range(len(prompts)) if index not in generations]:
            round_begin = time.perf_counter()
            asked = {index: prompts[index] for index in missing}
            mine, deaths = self._generate_round(asked, params)
            engine_s += time.perf_counter() - round_begin
            generations |= self._exchange.gather(mine, asked, with_experts=params.return_routed_experts)
            if deaths:
                self._revive(deaths, f"{len(prompts) - len(generations)} of {len(prompts)} prompts are generated again")
                self._pull_again()
        samples = [Sample(prompt=prompt, generation=generations[index]) for index, prompt in enumerate(prompts)]
        tokens = sum(len(generation.response_ids) for generation in generations.values())
        self.metrics = {
            "rollout/tokens": float(tokens),
            "rollout/engine_s": engine_s,
            "rollout/engine_restarts": float(self._restarts - self._reported_restarts),
            "rollout/tokens_per_s": tokens / (time.perf_counter() - begin),
        }
        self._reported_restarts = self._restarts
        return samples

    def update_weights(self) -> dict[str, float]:
        """Have every engine pull the actor's current weights; returns `reshard/*` and `rollout/weight_version`.

        Weights must not change until this returns. On GPUs the caller has waited for its own kernels.

        Raises:
            EngineError: any engine failed, or died and may not be restarted; none generates until an update succeeds.
        """
        begin = time.perf_counter()
        if self._world_size > 1:
            dist.barrier()
        reports = self._pull(self._next_version)
        self._next_version += 1
        return _reshard_metrics(reports, time.perf_counter() - begin)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Have every engine give up its memory of `tags` ("weights", "kv_cache", "cuda_graph")."""
        self._on_leaders(lambda engine: engine.release_memory(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Have every engine take its memory of `tags` again; weights need an update afterwards."""
        self._on_leaders(lambda engine: engine.resume_memory(tags))

    def close(self) -> None:
        """Stop this rank's part of an engine. Needs no other rank, so it also serves where one has failed."""
        part = self._engine or self._follower
        if part is not None:
            part.shutdown()

    def _generate_round(
        self, prompts: Mapping[int, Prompt], params: SamplingParams
    ) -> tuple[dict[int, Generation], list[_Death]]:
        """Have all engines answer the prompts; this rank's answers, and who died on the way.

        The engines that live take what a dead one left in the queue.
        """
        self._rounds += 1
        queue = SharedQueue(self._store, f"rollout/{self._rounds}", len(prompts))
        mine: dict[int, Generation] = {}

        def work(engine: StreamingEngine) -> list[_Death]:
            try:
                mine.update(self._respond(engine, queue, prompts, params))
            except EngineDiedError as error:
                mine.update(error.finished)
                return [_Death(rank=self._rank, reason=str(error))]
            return []

        return mine, [death for deaths in self._on_leaders(work, on_error=queue.close) for death in deaths]

    def _pull(self, version: int, *, redo: int = 0) -> list[WeightUpdateReport]:
        """Every engine's report of its update to `version`, with engines that die on the way restarted."""
        while True:
            try:
                outcomes = self._on_leaders(lambda engine: self._update(engine, version, redo))
            except Exception:
                self._control.renew()
                raise
            if deaths := [outcome for outcome in outcomes if isinstance(outcome, _Death)]:
                # Others that failed waited for them.
                self._revive(deaths, f"the update to version {version} is repeated")
            elif failures := [outcome for outcome in outcomes if isinstance(outcome, _Refusal)]:
                self._control.renew()
                raise EngineError(f"rollout engine of rank {failures[0].rank}: {failures[0].reason}")
            else:
                reports = [outcome for outcome in outcomes if isinstance(outcome, WeightUpdateReport)]
                self._check_arrived(reports)
                return reports

    def _check_arrived(self, reports: Sequence[WeightUpdateReport]) -> None:
        """Raise alike on all ranks unless what engines read from each other's devices is what lies there."""
        try:
            check_peer_sums([sums for report in reports for sums in report.peer_sums], whole_job=True)
        except ReshardError as error:
            if self._engine is not None:
                self._engine.refuse_weights(f"the last weight update failed; repeat it: {error}")
            self._control.renew()
            raise EngineError(str(error)) from error

    def _update(self, engine: StreamingEngine, version: int, redo: int) -> WeightUpdateReport | _Death | _Refusal:
        try:
            return engine.update_weights(self._control.message, weight_version=version, redo=redo)
        except Exception as error:
            # Its ranks may not have come so far as to say so themselves.
            self._control.give_up(update_round(version, redo), f"rollout engine of rank {self._rank}: {error}")
            if isinstance(error, EngineDiedError):
                return _Death(rank=self._rank, reason=str(error))
            if isinstance(error, EngineError):
                return _Refusal(rank=self._rank, reason=str(error))
            raise

    def _pull_again(self) -> None:
        """After a restart: the version that engines have had, with other random numbers than those used up."""
        self._pull(self.weight_version, redo=self._restarts)

    def _revive(self, deaths: Sequence[_Death], consequence: str) -> None:
        """Restart engines that died.

        Raises:
            EngineError: they may not be restarted again, or did not start.
        """
        names = "; ".join(f"rollout engine of rank {death.rank}: {death.reason}" for death in deaths)
        if self._restarts + len(deaths) > self._max_restarts:
            raise EngineError(
                f"{names}\n{self._restarts} restarts of engines were made and "
                f"actor_rollout_ref.rollout.max_engine_restarts = {self._max_restarts} allows no more"
            )
        self._restarts += len(deaths)
        if self._rank == deaths[0].rank:
            logger.warning("%s\nrestarting it; %s", names, consequence)
        dead = {death.rank for death in deaths}
        begin = time.perf_counter()
        gather_results(self._make_room)
        gather_results(lambda: self._restart_part(dead))
        if self._rank == deaths[0].rank:
            logger.warning("restarted after %.1f s", time.perf_counter() - begin)
        self._control.renew()

    def _restart_part(self, dead: Collection[int]) -> None:
        """Restart this rank's engine, or its part of one, if the leader is among the dead."""
        part = self._engine or self._follower
        leader = max((leader for leader in self._leaders if leader <= self._rank), default=-1)
        if part is None or leader not in dead:
            return
        try:
            part.restart()
        except EngineError as error:
            raise EngineError(f"rollout engine of rank {leader}: {error}") from error

    def _respond(
        self, engine: StreamingEngine, queue: SharedQueue, prompts: Mapping[int, Prompt], params: SamplingParams
    ) -> dict[int, Generation]:
        indices = list(prompts)
        if len(self._leaders) == 1:
            # In one message the engine always forms the same batches, so a rerun samples the same tokens.
            try:
                responses = engine.generate([prompt.token_ids for prompt in prompts.values()], params)
            except EngineDiedError as error:
                error.finished = {indices[place]: response for place, response in error.finished.items()}
                raise
            return dict(zip(indices, responses, strict=True))

        def take(free: int) -> list[tuple[int, Sequence[int]]]:
            return [(indices[place], prompts[indices[place]].token_ids) for place in queue.take(free)]

        # No engine starts with more than its share, however early it asks.
        share = -(-len(prompts) // len(self._leaders))
        return engine.generate_from(take, params, window=max(1, min(self._window, share)))

    def _on_leaders(
        self, work: Callable[[StreamingEngine], Result], on_error: Callable[[], None] | None = None
    ) -> list[Result]:
        """Every leader's result, on every rank. Failures are agreed on before any rank raises."""

        def attempt() -> Result | None:
            if self._engine is None:
                return None
            try:
                return work(self._engine)
            except Exception as error:
                if on_error is not None:
                    on_error()
                if isinstance(error, EngineError):
                    raise EngineError(f"rollout engine of rank {self._rank}: {error}") from error
                raise

        return [result for result in gather_results(attempt) if result is not None]


def _reshard_metrics(reports: Sequence[WeightUpdateReport], seconds: float) -> dict[str, float]:
    num_bytes = sum(report.bytes for report in reports)
    pull_s = max(report.pull_s for report in reports)
    local, remote = sum(report.local_bytes for report in reports), sum(report.remote_bytes for report in reports)
    return {
        "reshard/bytes": float(num_bytes),
        "reshard/local_bytes": float(local),
        "reshard/same_host_bytes": float(num_bytes - local - remote),
        "reshard/remote_bytes": float(remote),
        "reshard/aliased_bytes": float(sum(report.aliased_bytes for report in reports)),
        "reshard/ops": float(sum(report.ops for report in reports)),
        "reshard/pull_s": pull_s,
        "reshard/call_s": max(report.call_s for report in reports),
        "reshard/total_s": seconds,
        "reshard/gb_per_s": num_bytes / max(pull_s, 1e-9) / 1e9,
        "rollout/weight_version": float(reports[0].weight_version),
    }
