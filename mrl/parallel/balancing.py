"""Deals samples out to ranks and micro-batches so that all have about the same number of tokens. Pure Python.

Every function is deterministic: ranks that call it with the same lengths get the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_Part = tuple[int, int, tuple[int, ...]]
"""(sum of lengths, number of samples, their indices)."""


def partition_balanced(lengths: Sequence[int], num_parts: int, *, equal_size: bool) -> list[list[int]]:
    """Indices of `lengths` in `num_parts` non-empty parts of nearly equal total length.

    Largest differencing: partial partitions are merged two at a time, those with the widest spread first, the heavy
    parts of one with the light parts of the other.

    Args:
        lengths: not negative.
        num_parts: at least 1.
        equal_size: whether all parts must have the same number of samples.

    Returns:
        Parts in the order of their smallest index, each ascending.

    Raises:
        ValueError: fewer samples than parts, or a number that equal parts cannot share.

    Source: Karmarkar and Karp, "The Differencing Method of Set Partitioning" (1982).
    """
    if not 1 <= num_parts <= len(lengths):
        raise ValueError(f"{len(lengths)} samples cannot fill {num_parts} parts; use at least one sample for each part")
    if equal_size and len(lengths) % num_parts:
        raise ValueError(
            f"{len(lengths)} samples do not divide into {num_parts} parts of equal size; change the batch size to a "
            f"multiple of {num_parts}"
        )
    partials = _initial_partitions(lengths, num_parts if equal_size else 1)
    heap = [(-_spread(parts, num_parts), tie, parts) for tie, parts in enumerate(partials)]
    heapq.heapify(heap)
    for tie in range(len(heap), 2 * len(heap) - 1):
        wide, narrow = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        parts = _merge(wide, narrow, num_parts)
        heapq.heappush(heap, (-_spread(parts, num_parts), tie, parts))
    return sorted(sorted(indices) for _, _, indices in heap[0][2])


def split_micro_batches(lengths: Sequence[int], *, micro_batch_size: int) -> list[list[int]]:
    """Indices of `lengths` in ceil(n / micro_batch_size) groups of at most `micro_batch_size`, alike in length.

    Neighbours in order of length share a group, which makes padding to the longest of each group cheapest. Groups
    come longest first, so that a peak of memory shows at once.

    Raises:
        ValueError: micro_batch_size is less than 1.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size = {micro_batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[first : first + micro_batch_size] for first in range(0, len(order), micro_batch_size)]


def split_token_batches(
    lengths: Sequence[int], *, max_tokens: int, min_batches: int = 1, multiple_of: int = 1
) -> list[list[int]]:
    """Indices of `lengths` in the fewest balanced groups of at most `max_tokens` tokens each.

    Args:
        lengths: tokens of each sample, not negative.
        max_tokens: bound on the sum of a group's lengths.
        min_batches: at least this many groups; data-parallel ranks that must run equally many take the largest need.
        multiple_of: the number of groups is a multiple of this, for interleaved pipeline schedules.

    Raises:
        ValueError: a sample is longer than max_tokens, or there are fewer samples than groups needed.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(
            f"a sample of {max(lengths)} tokens exceeds ppo_max_token_len_per_gpu = {max_tokens}; raise the limit or "
            "lower data.max_prompt_length + data.max_response_length"
        )
    fewest = max(-(-sum(lengths) // max_tokens), min_batches, 1)
    count = -(-fewest // multiple_of) * multiple_of
    while True:
        groups = partition_balanced(lengths, count, equal_size=False)
        if all(sum(lengths[index] for index in group) <= max_tokens for group in groups):
            return groups
        count += multiple_of


def _initial_partitions(lengths: Sequence[int], parts_each: int) -> list[list[_Part]]:
    """Partial partitions, heaviest part first; parts that are not listed are empty."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    singles: list[_Part] = [(lengths[index], 1, (index,)) for index in order]
    return [singles[first : first + parts_each] for first in range(0, len(singles), parts_each)]


def _merge(wide: list[_Part], narrow: list[_Part], num_parts: int) -> list[_Part]:
    """Both at once, the heaviest of one with the lightest of the other, empty parts being the lightest."""
    overlap = max(len(wide) + len(narrow) - num_parts, 0)
    keep_wide, keep_narrow = len(wide) - overlap, len(narrow) - overlap
    pairs = zip(wide[keep_wide:], reversed(narrow[keep_narrow:]), strict=True)
    joined = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
    return sorted(wide[:keep_wide] + narrow[:keep_narrow] + joined, key=lambda part: (-part[0], -part[1], part[2]))


def _spread(parts: list[_Part], num_parts: int) -> int:
    lightest = parts[-1][0] if len(parts) == num_parts else 0
    return parts[0][0] - lightest
