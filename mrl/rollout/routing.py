"""The experts of all tokens of a rollout, once in each host's memory.

They are as many bytes as a token has experts in all layers: hundreds. So no rank gets a copy of its own. The engines'
leaders write theirs into memory that all ranks of the host map, the first ranks of the hosts exchange the rest, and
every generation gets a view. The memory is freed with the last of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mrl.interfaces import EngineError
from mrl.parallel.agreement import gather_results
from mrl.reshard.layout import SourceBuffer
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transport import export_storage, open_buffer
from mrl.types import Generation, Prompt

Shares = Mapping[int, Mapping[int, Generation]]
"""What each rank has generated, by rank and by index of the prompt, in the same order everywhere."""


class RoutedExpertsExchange:
    """Gives all ranks what the engines' leaders know. Called by all ranks.

    Args:
        hosts: the name of each rank's host.
        spec: of a model with experts.
    """

    def __init__(self, hosts: Sequence[str], spec: ModelSpec, *, rank: int) -> None:
        assert spec.moe is not None, "a model without experts has nothing to exchange"
        self._rank = rank
        self._head_of = [hosts.index(host) for host in hosts]
        self._k, self._num_experts = spec.moe.num_experts_per_tok, spec.moe.num_experts
        self._width = spec.num_hidden_layers * self._k
        self._dtype = torch.uint8 if self._num_experts <= 256 else torch.int16
        self._heads = sorted(set(self._head_of))
        self._group = dist.new_group(self._heads, backend="gloo") if len(self._heads) > 1 else None

    def share(self, shares: Shares, mine: Mapping[int, Generation], prompts: Mapping[int, Prompt]) -> None:
        """Set `routed_experts` of all generations of `shares`.

        Args:
            mine: this rank's, with their experts.
            prompts: those of all generations.

        Raises:
            EngineError: an engine has reported experts that the model does not have, or not of all tokens and layers,
                or a host has no shared memory left. Raised on all ranks.
        """
        rows = [
            len(prompts[index].token_ids) + len(generation.response_ids) - 1
            for share in shares.values()
            for index, generation in share.items()
        ]
        if not rows:
            return
        memory = self._allocate(sum(rows))
        views = iter(memory.split(rows))
        for share in shares.values():
            for generation in share.values():
                generation.routed_experts = next(views)
        gather_results(lambda: self._write(shares.get(self._rank, {}), mine))
        self._exchange(shares, memory)

    def _allocate(self, rows: int) -> Tensor:
        """[rows, layers k], the same memory on all ranks of a host."""
        num_bytes, head = rows * self._width * self._dtype.itemsize, self._head_of[self._rank]
        memory = torch.empty(0, dtype=torch.uint8)

        def share() -> SourceBuffer | None:
            nonlocal memory
            if head != self._rank:
                return None
            memory = self._new_shared_memory(num_bytes)
            return export_storage(memory)

        def map_it() -> None:
            nonlocal memory
            buffer = buffers[head]
            if head != self._rank and buffer is not None:
                memory = open_buffer(buffer)

        buffers = gather_results(share)
        gather_results(map_it)
        return memory[:num_bytes].view(self._dtype).view(rows, self._width)

    def _new_shared_memory(self, num_bytes: int) -> Tensor:
        try:
            # Shared from the start: moving memory there later would copy what nobody has written yet.
            storage = torch.UntypedStorage._new_using_fd_cpu(num_bytes)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self._rank} cannot share {num_bytes} bytes with its host's ranks for router_replay ({error}); "
                "enlarge /dev/shm (containers: --shm-size), or generate fewer tokens in a step"
            ) from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def _write(self, share: Mapping[int, Generation], mine: Mapping[int, Generation]) -> None:
        for index, generation in share.items():
            found, place = mine[index].routed_experts, generation.routed_experts
            assert place is not None
            problem = self._find_problem(found, place.shape)
            if found is None or problem:
                raise EngineError(f"the rollout engine of rank {self._rank} reported {problem}")
            place.copy_(found)

    def _find_problem(self, found: Tensor | None, shape: torch.Size) -> str | None:
        """What about a sample's experts would end in an illegal access, or in a token sent to fewer than k of them."""
        if found is None or found.shape != shape:
            return (
                f"experts of shape {None if found is None else tuple(found.shape)} for a sample that needs "
                f"{tuple(shape)} (tokens but the last, layers x experts per token)"
            )
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self._num_experts:
            return f"experts {int(found.min())} to {int(found.max())} of a model with {self._num_experts}"
        first, *others = found.view(len(found), -1, self._k).unbind(2)
        if any(bool((first == other).any()) for other in others):
            return "an expert twice for the same token and layer, as for layers that it does not capture"
        return None

    def _exchange(self, shares: Shares, memory: Tensor) -> None:
        """Bring what each host's leaders have written to the other hosts."""
        if self._group is not None and self._rank in self._heads:
            sizes = [sum(_rows(each) for each in share.values()) for share in shares.values()]
            for leader, part in zip(shares, memory.split(sizes), strict=True):
                # As bytes: gloo sends no int16.
                dist.broadcast(part.view(torch.uint8), src=self._head_of[leader], group=self._group)
        # The other ranks of a host read what its head receives, and the head must not free it before they map it.
        gather_results(lambda: None)


def _rows(generation: Generation) -> int:
    return 0 if generation.routed_experts is None else len(generation.routed_experts)
