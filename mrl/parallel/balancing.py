"""Deals samples out to ranks and micro-batches so that all have about the same number of tokens. Pure Python.

Every function is deterministic: ranks that call it with the same lengths get the same answer.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

_Part = tuple[int, int, tuple[int, ...]]
"""(sum of lengths, number of samples, their indices)."""

_DIFFERENCED_PER_PART = 8
"""Of the shortest samples: what the longer ones leave uneven they level, and each costs a merge of all parts."""


def partition_balanced(lengths: Sequence[int], num_parts: int, *, equal_size: bool) -> list[list[int]]:
    """Indices of `lengths` in `num_parts` non-empty parts of nearly equal total length.

    Largest differencing: partial partitions are merged two at a time, those with the widest spread first, the heavy
    parts of one with the light parts of the other. Of many samples for each part the longest are dealt out before, each
    to the part that has least; unless all parts must be of equal size.

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
    partials = _rows_of_equals(lengths, num_parts) if equal_size else _singles(lengths, num_parts)
    heap = [(-_spread(parts, num_parts), tie, parts) for tie, parts in enumerate(partials)]
    heapq.heapify(heap)
    for tie in range(len(heap), 2 * len(heap) - 1):
        wide, narrow = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        parts = _merge(wide, narrow, num_parts)
        heapq.heappush(heap, (-_spread(parts, num_parts), tie, parts))
    return sorted(sorted(indices) for _, _, indices in heap[0][2])


def deal_balanced(costs: Sequence[int], num_parts: int, *, equal_counts: bool = False) -> list[list[int]]:
    """Indices of `costs` in `num_parts` parts of nearly equal cost, of which some are empty if there are too few.

    Args:
        equal_counts: whether no part may have more than ceil(n / num_parts) samples.
    """
    count = max(-(-len(costs) // num_parts) * num_parts if equal_counts else len(costs), num_parts)
    padded = [*costs, *[0] * (count - len(costs))]
    parts = partition_balanced(padded, num_parts, equal_size=equal_counts)
    return [[index for index in part if index < len(costs)] for part in parts]


def split_padded(
    lengths: Sequence[int], *, max_samples: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in the fewest groups within the limit, neighbours in order of length sharing one.

    That makes padding to the longest of each group cheapest. Groups come longest first, so that a peak of memory
    shows at once.

    Args:
        max_samples: most samples of a group.
        max_tokens: most tokens of a group, counted with its padding; at least the longest sample.
    """
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        count = len(groups[-1]) + 1 if groups else 0
        fits = (
            count > 0
            and (max_samples is None or count <= max_samples)
            and (max_tokens is None or count * lengths[groups[-1][0]] <= max_tokens)
        )
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def fill_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in groups of at most `max_tokens` tokens, each sample where it leaves the least room.

    Never more than 11/9 of the fewest possible groups and one; no two of them would fit together.

    Args:
        max_tokens: at least the longest sample.

    Source: best-fit decreasing; Johnson, "Near-Optimal Bin Packing Algorithms" (1973).
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in _longest_first(lengths):
        place = bisect.bisect_left(rooms, (lengths[index], 0))
        if place < len(rooms):
            room, group = rooms.pop(place)
            groups[group].append(index)
        else:
            room, group = max_tokens, len(groups)
            groups.append([index])
        bisect.insort(rooms, (room - lengths[index], group))
    return groups


def compute_workload(length: int, *, crossover: int) -> int:
    """Relative cost of one sample's pass: its matrix products, linear in its length, and its causal attention.

    Args:
        crossover: length at which both are equal, as `attention_crossover` computes it.
    """
    return length * (crossover + length)


def attention_crossover(*, parameters_per_layer: int, attention_size: int) -> int:
    """Length in tokens at which causal attention takes as many multiplications as the matrix products.

    A token is multiplied with every weight once; a pair of query and key, of which causality leaves half, takes
    2 x `attention_size` multiplications.

    Args:
        parameters_per_layer: those that a token is multiplied with.
        attention_size: heads x head dimension.
    """
    return parameters_per_layer // attention_size


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, equal ones in their order."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _rows_of_equals(lengths: Sequence[int], num_parts: int) -> list[list[_Part]]:
    """Partial partitions with a sample in every part, heaviest part first."""
    singles: list[_Part] = [(lengths[index], 1, (index,)) for index in _longest_first(lengths)]
    return [singles[first : first + num_parts] for first in range(0, len(singles), num_parts)]


def _singles(lengths: Sequence[int], num_parts: int) -> list[list[_Part]]:
    """Partial partitions of one part each, of which a sample is one or all that were dealt to a part before."""
    order = _longest_first(lengths)
    split = max(0, len(order) - _DIFFERENCED_PER_PART * num_parts)
    dealt: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for index in order[:split]:
        load, part = loads[0]
        heapq.heapreplace(loads, (load + lengths[index], part))
        dealt[part].append(index)
    parts: list[_Part] = [(load, len(dealt[part]), tuple(dealt[part])) for load, part in loads if dealt[part]]
    parts += [(lengths[index], 1, (index,)) for index in order[split:]]
    return [[part] for part in parts]


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
