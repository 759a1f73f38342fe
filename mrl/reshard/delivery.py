"""A plan bound to memory on both ways that weights take: pulled within the host, exchanged with other hosts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mrl.reshard.exchange import STAGING_BYTES, Exchange, ExchangeResult, Wire
from mrl.reshard.execute import Puller, PullResult, bind_aliases, open_sources
from mrl.reshard.layout import SourceRank
from mrl.reshard.plan import Plan
from mrl.reshard.routes import EnginePlaces

_NOTHING = ExchangeResult(sent_bytes=0, received_bytes=0, seconds=0.0)


@dataclass(kw_only=True, frozen=True)
class DeliveryResult:
    """What one delivery did on this engine rank."""

    pull: PullResult
    exchange: ExchangeResult
    seconds: float


class Delivery:
    """Brings an engine rank the trainer's weights, as often as it is run.

    Args:
        params: the engine rank's live parameters by name; those that the plan aliases become the trainer's memory.
        places: all engine ranks of the job; this one opens the buffers of its own host only.
        capacity: most bytes of one message between hosts, a multiple of 8.

    Raises:
        ValueError: the parameters are not those the plan was made for, or cannot be the trainer's memory.
        ReshardError: a buffer cannot be opened.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[SourceRank],
        params: Mapping[str, Tensor],
        places: EnginePlaces,
        *,
        capacity: int = STAGING_BYTES,
    ) -> None:
        self.plan = plan
        buffers = open_sources(plan, sources)
        bind_aliases(plan, buffers, params)
        self._puller = Puller(plan, buffers, params)
        self._exchange = Exchange(
            plan, buffers, params, rank=places.rank, num_ranks=len(places.hosts), capacity=capacity
        )
        self._device = next(iter(params.values())).device

    def run(self, wire: Wire | None) -> DeliveryResult:
        """Pull, and exchange over `wire` meanwhile; returns when all bytes have arrived and are what was sent.

        Called by all engine ranks that have something to exchange.

        Raises:
            ReshardError: of either; the weights are unusable.
        """
        start = time.perf_counter()
        if wire is None:
            assert not self.plan.crosses_hosts
            pull, exchange = self._puller.pull(), _NOTHING
        else:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pull") as beside:
                pulling = beside.submit(self._pull_beside)
                exchange = self._exchange.run(wire)
                pull = pulling.result()
        return DeliveryResult(pull=pull, exchange=exchange, seconds=time.perf_counter() - start)

    def _pull_beside(self) -> PullResult:
        if self._device.type != "cuda":
            return self._puller.pull()
        # A thread starts with the first device, and on the stream that the exchange packs on.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            return self._puller.pull()
