"""Which samples of a batch each data-parallel rank runs, in which micro-batches. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrl.parallel.balancing import compute_workload, deal_balanced, fill_batches, partition_balanced, split_padded
from mrl.types import MicroBatchLimit


@dataclass(kw_only=True, frozen=True)
class PlanRules:
    """What holds for every plan of a role."""

    dp_size: int
    count_multiple: int = 1
    """A rank's number of micro-batches is a multiple of this."""
    packed: bool = False
    """Whether the samples of a micro-batch lie end to end instead of being padded to the longest."""
    crossover: int = 0
    """Length at which attention costs as much as the rest of the model."""


def plan_micro_batches(
    lengths: Sequence[int], *, limit: MicroBatchLimit, rules: PlanRules, dp_rank: int
) -> list[list[int]]:
    """Sample indices of each micro-batch of one data-parallel rank; an empty list is a micro-batch without samples.

    Samples are dealt to data-parallel ranks so that each computes about as much, with little padding. Every rank gets
    the same number of micro-batches, as pipeline schedules need; where the samples do not suffice some are empty. The
    plan depends on the arguments only, so that all ranks' parts of it fit together.

    Args:
        lengths: tokens of each sample.

    Raises:
        ValueError: no samples, or one that is longer than limit.tokens.
    """
    if not lengths:
        raise ValueError("cannot split a batch of 0 samples into micro-batches; give at least 1")
    if limit.tokens is not None and max(lengths) > limit.tokens:
        raise ValueError(
            f"a sample of {max(lengths)} tokens exceeds the {limit.tokens} tokens of a micro-batch; raise "
            "the role's *_max_token_len_per_gpu"
        )
    plan = _plan_packed if rules.packed else _plan_padded
    share = plan(lengths, limit, rules, dp_rank)
    return sorted(share, key=lambda indices: (-_computed_tokens(lengths, indices, rules), indices))


def _plan_padded(lengths: Sequence[int], limit: MicroBatchLimit, rules: PlanRules, dp_rank: int) -> list[list[int]]:
    """Samples of like length share a micro-batch; micro-batches are dealt to ranks."""
    fewest = len(split_padded(lengths, max_samples=limit.samples, max_tokens=limit.tokens))
    total = _round_up(fewest, rules.dp_size * rules.count_multiple)
    micro_batches = _split_evenly(lengths, limit, total)
    micro_batches += [[] for _ in range(total - len(micro_batches))]
    costs = [
        len(indices) * compute_workload(max((lengths[i] for i in indices), default=0), crossover=rules.crossover)
        for indices in micro_batches
    ]
    shares = partition_balanced(costs, rules.dp_size, equal_size=True)
    return [micro_batches[position] for position in shares[dp_rank]]


def _split_evenly(lengths: Sequence[int], limit: MicroBatchLimit, most: int) -> list[list[int]]:
    """The split into at most `most` micro-batches whose largest is smallest."""
    if limit.tokens is None:
        return split_padded(lengths, max_samples=-(-len(lengths) // most))
    low, high = max(lengths), limit.tokens
    while low < high:
        middle = (low + high) // 2
        if len(split_padded(lengths, max_tokens=middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return split_padded(lengths, max_tokens=low)


def _plan_packed(lengths: Sequence[int], limit: MicroBatchLimit, rules: PlanRules, dp_rank: int) -> list[list[int]]:
    """Samples are dealt to ranks, and each rank's to micro-batches, in which they lie longest first."""
    costs = [compute_workload(length, crossover=rules.crossover) for length in lengths]
    shares = deal_balanced(costs, rules.dp_size, equal_counts=limit.samples is not None)
    count = _round_up(max(_count_packed(lengths, share, limit) for share in shares), rules.count_multiple)
    return _split_share(lengths, costs, shares[dp_rank], limit, count)


def _count_packed(lengths: Sequence[int], share: Sequence[int], limit: MicroBatchLimit) -> int:
    if limit.tokens is None:
        assert limit.samples is not None
        return -(-len(share) // limit.samples)
    return len(fill_batches([lengths[index] for index in share], max_tokens=limit.tokens))


def _split_share(
    lengths: Sequence[int], costs: Sequence[int], share: Sequence[int], limit: MicroBatchLimit, count: int
) -> list[list[int]]:
    """`count` micro-batches of one rank, balanced by cost where the limit allows it, else by tokens, else as packed."""
    share_lengths = [lengths[index] for index in share]
    share_costs = [costs[index] for index in share]
    groups = deal_balanced(share_costs, count, equal_counts=limit.samples is not None)
    if limit.tokens is not None and _largest(share_lengths, groups) > limit.tokens:
        groups = deal_balanced(share_lengths, count)
        if _largest(share_lengths, groups) > limit.tokens:
            groups = fill_batches(share_lengths, max_tokens=limit.tokens)
            groups += [[] for _ in range(count - len(groups))]
    return [sorted((share[position] for position in group), key=lambda i: (-lengths[i], i)) for group in groups]


def _largest(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[index] for index in group) for group in groups)


def _computed_tokens(lengths: Sequence[int], indices: Sequence[int], rules: PlanRules) -> int:
    if rules.packed:
        return sum(lengths[index] for index in indices)
    return len(indices) * max((lengths[index] for index in indices), default=0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
