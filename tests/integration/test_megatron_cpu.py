"""What megatron's modules are given where gloo lacks something."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from mrl.backends.megatron.preload import preload_megatron

SIZES = [2, 0, 3]
"""Rows of each rank, as numbers of tokens that ranks have for an expert."""


def rows(rank: int, factor: float = 1.0) -> Tensor:
    return factor * torch.arange(SIZES[rank] * 2.0).view(-1, 2) + 10 * rank


def gather_and_scatter() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The gathered rows and their gradient, and the scattered sums and their gradient."""
    # Only importable once megatron is ready.
    from megatron.core.tensor_parallel import mappings

    group, rank = dist.group.WORLD, dist.get_rank()
    mine = rows(rank).requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=SIZES)
    (gathered * (rank + 1)).sum().backward()
    whole = torch.cat([rows(other, rank + 1) for other in range(3)]).requires_grad_()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=SIZES)
    (scattered * (rank + 1)).sum().backward()
    return gathered.detach(), mine.grad, scattered.detach(), whole.grad


def test_ranks_may_have_different_numbers_of_rows() -> None:
    preload_megatron()
    everything = torch.cat([rows(rank) for rank in range(3)])
    owner = torch.tensor([rank + 1.0 for rank in range(3) for _ in range(SIZES[rank])]).view(-1, 1)
    for rank, (gathered, gradient, scattered, whole_gradient) in enumerate(run_on_ranks(gather_and_scatter, 3)):
        assert torch.equal(gathered, everything)
        # Each of the three weighs what it gathered with its number: 1 + 2 + 3.
        assert torch.equal(gradient, torch.full((SIZES[rank], 2), 6.0))
        assert torch.equal(scattered, sum(rows(rank, other + 1) for other in range(3)))
        assert torch.equal(whole_gradient, owner.expand(-1, 2))
