"""Which samples of a batch each data-parallel rank runs, in which micro-batches. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from mrl.parallel.balancing import partition_balanced, split_micro_batches

MicroBatchPlan = list[list[list[int]]]
"""[dp_rank][micro-batch] -> sample indices; an empty list is a micro-batch without samples."""


def plan_micro_batches(
    lengths: Sequence[int], *, dp_size: int, micro_batch_size: int, count_multiple: int = 1
) -> MicroBatchPlan:
    """Deal samples to data-parallel ranks so that padded tokens are few and balanced.

    Every rank gets the same number of micro-batches, as pipeline schedules need; where the samples do not suffice
    some micro-batches are empty. The plan depends on the arguments only, so that all ranks make the same one.

    Args:
        lengths: tokens of each sample.
        micro_batch_size: most samples in one micro-batch.
        count_multiple: a rank's number of micro-batches is rounded up to a multiple of this.

    Raises:
        ValueError: no samples, or micro_batch_size is less than 1.
    """
    if not lengths or micro_batch_size < 1:
        raise ValueError(
            f"cannot split a batch of {len(lengths)} samples into micro-batches of micro_batch_size = "
            f"{micro_batch_size}; both must be at least 1"
        )
    per_rank = -(-len(lengths) // (micro_batch_size * dp_size))
    per_rank = -(-per_rank // count_multiple) * count_multiple
    total = dp_size * per_rank
    micro_batches = split_micro_batches(lengths, micro_batch_size=-(-len(lengths) // total))
    micro_batches += [[] for _ in range(total - len(micro_batches))]
    costs = [len(indices) * max((lengths[index] for index in indices), default=0) for indices in micro_batches]
    shares = partition_balanced(costs, dp_size, equal_size=True)
    return [[micro_batches[position] for position in share] for share in shares]
