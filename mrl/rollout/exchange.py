"""Every engine's generations, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from mrl.parallel.agreement import gather_results
from mrl.reshard.spec import ModelSpec
from mrl.rollout.routing import RoutedExpertsExchange
from mrl.rollout.wire import decode, encode
from mrl.types import Generation, Prompt


class GenerationExchange:
    """Gives all ranks what the ranks that lead engines have. Built and called by all ranks.

    Args:
        hosts: the name of each rank's host.
        spec: the actor's model.
    """

    def __init__(self, hosts: Sequence[str], spec: ModelSpec, *, rank: int) -> None:
        self._rank = rank
        self._experts = RoutedExpertsExchange(hosts, spec, rank=rank) if spec.moe else None

    def gather(
        self, mine: Mapping[int, Generation], prompts: Mapping[int, Prompt], *, with_experts: bool = False
    ) -> dict[int, Generation]:
        """Every rank's generations by the index of their prompt, on every rank.

        Args:
            mine: this rank's.
            prompts: those of all generations.
            with_experts: whether they come with `routed_experts`.

        Raises:
            EngineError: see `RoutedExpertsExchange.share`. Raised on all ranks.
            ValueError: experts are wanted of a model that has none.
        """
        numbers, log_probs = encode(mine)
        shares: dict[int, dict[int, Generation]] = {}
        for rank, (num_numbers, num_log_probs) in enumerate(
            gather_results(lambda: (numbers.numel(), log_probs.numel()))
        ):
            if num_numbers == 0:
                continue
            if rank == self._rank:
                parts = numbers, log_probs
            else:
                parts = torch.empty(num_numbers, dtype=torch.int32), torch.empty(num_log_probs, dtype=torch.float32)
            if dist.is_initialized() and dist.get_world_size() > 1:
                for part in parts:
                    dist.broadcast(part, src=rank)
            shares[rank] = decode(*parts)
        if with_experts:
            if self._experts is None:
                raise ValueError("experts were asked for of a model that has none")
            self._experts.share(shares, mine, prompts)
        return {index: each for share in shares.values() for index, each in share.items()}
