"""Balanced partitions: optimal small cases, bounds, and what every partition must keep."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl.parallel.balancing import (
    attention_crossover,
    compute_workload,
    deal_balanced,
    fill_batches,
    partition_balanced,
    split_padded,
)


def sums(parts: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in part) for part in parts]


def smallest_maximum(lengths: list[int], num_parts: int, *, equal_size: bool) -> int:
    """By trying every assignment."""
    best = sum(lengths)
    for assignment in product(range(num_parts), repeat=len(lengths)):
        parts = [[index for index, part in enumerate(assignment) if part == each] for each in range(num_parts)]
        if not equal_size or len({len(part) for part in parts}) == 1:
            best = min(best, max(sums(parts, lengths)))
    return best


def test_differencing_hand_worked_case() -> None:
    # Karmarkar-Karp on 8 7 6 5 4: 8-7=1, 6-5=1, 4-1=3, 3-1=2, so the sums are 16 and 14.
    parts = partition_balanced([8, 7, 6, 5, 4], 2, equal_size=False)
    assert sorted(sums(parts, [8, 7, 6, 5, 4])) == [14, 16]
    # With equal counts the pairs (8, 7), (6, 5), (4, 2) spread by 1, 1 and 2: 2-1=1, 1-1=0, so 16 on both sides.
    parts = partition_balanced([8, 7, 6, 5, 4, 2], 2, equal_size=True)
    assert sums(parts, [8, 7, 6, 5, 4, 2]) == [16, 16]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    num_parts=st.integers(1, 8),
    equal_size=st.booleans(),
)
def test_every_index_once_no_part_empty_counts_equal_if_asked(
    lengths: list[int], num_parts: int, equal_size: bool
) -> None:
    num_parts = min(num_parts, len(lengths))
    if equal_size:
        lengths = lengths[: len(lengths) // num_parts * num_parts]
    parts = partition_balanced(lengths, num_parts, equal_size=equal_size)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert len(parts) == num_parts
    assert all(parts)
    if equal_size:
        assert {len(part) for part in parts} == {len(lengths) // num_parts}
        # Merging the widest with the next in opposite order never spreads further than the widest row of lengths.
        assert max(sums(parts, lengths)) - min(sums(parts, lengths)) <= max(lengths)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=6, max_size=6), num_parts=st.sampled_from([2, 3]))
def test_close_to_the_optimum_of_exhaustive_search(lengths: list[int], num_parts: int) -> None:
    for equal_size in (False, True):
        best = smallest_maximum(lengths, num_parts, equal_size=equal_size)
        found = max(sums(partition_balanced(lengths, num_parts, equal_size=equal_size), lengths))
        assert best <= found <= 4 / 3 * best


def test_balance_depends_on_lengths_and_not_on_their_order() -> None:
    lengths = [17, 3, 90, 41, 41, 8, 64, 5, 23, 77, 12, 30]
    whole = sorted(sums(partition_balanced(lengths, 4, equal_size=True), lengths))
    for shift in range(1, len(lengths)):
        turned = lengths[shift:] + lengths[:shift]
        assert sorted(sums(partition_balanced(turned, 4, equal_size=True), turned)) == whole


def test_long_tailed_batch_is_balanced_within_one_percent() -> None:
    lengths = [64 + (index * index * 7919) % 4001 for index in range(1024)]
    parts = partition_balanced(lengths, 16, equal_size=True)
    assert max(sums(parts, lengths)) <= 1.01 * min(sums(parts, lengths))
    contiguous = [list(range(first, first + 64)) for first in range(0, 1024, 64)]
    assert max(sums(contiguous, lengths)) > 1.1 * min(sums(contiguous, lengths))


@settings(max_examples=25, deadline=None)
@given(num_parts=st.integers(2, 5), seed=st.integers(0, 100))
def test_many_samples_are_dealt_out_as_evenly_as_differencing_alone_would(num_parts: int, seed: int) -> None:
    lengths = [10 + (index * index * 7919 + seed * 31) % 4001 for index in range(40 * num_parts)]
    parts = partition_balanced(lengths, num_parts, equal_size=False)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    # What the long ones leave uneven is at most one of them, and the short ones are many.
    assert max(sums(parts, lengths)) - min(sums(parts, lengths)) <= 0.001 * sum(lengths)


def test_a_sample_as_long_as_all_others_has_a_part_for_itself() -> None:
    assert partition_balanced([1000, *[10] * 100], 2, equal_size=False) == [[0], list(range(1, 101))]


def test_impossible_partitions_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot fill 4 parts"):
        partition_balanced([1, 2, 3], 4, equal_size=False)
    with pytest.raises(ValueError, match="multiple of 2"):
        partition_balanced([1, 2, 3], 2, equal_size=True)


def test_few_samples_leave_parts_empty() -> None:
    assert deal_balanced([5, 7], 4) == [[0], [1], [], []]
    # Two at most in each of three: the rows 6 5 4 and 2 1 0 in opposite order are 6 each.
    assert deal_balanced([6, 5, 4, 2, 1], 3, equal_counts=True) == [[0], [1, 4], [2, 3]]


def test_padded_groups_hold_similar_lengths_longest_first() -> None:
    lengths = [5, 90, 7, 88, 6]
    assert split_padded(lengths, max_samples=2) == [[1, 3], [2, 4], [0]]
    # 90 + 88 padded are 180 tokens; 7 + 6 + 5 padded are 21.
    assert split_padded(lengths, max_tokens=180) == [[1, 3], [2, 4, 0]]
    assert split_padded(lengths, max_tokens=179) == [[1], [3, 2], [4, 0]]
    assert split_padded(lengths, max_tokens=90) == [[1], [3], [2, 4, 0]]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), slack=st.integers(0, 40))
def test_padded_groups_are_as_few_as_any(lengths: list[int], slack: int) -> None:
    limit = max(lengths) + slack

    def fits(group: list[int]) -> bool:
        return len(group) * max(lengths[index] for index in group) <= limit

    def count(assignment: tuple[int, ...]) -> int:
        groups = [[index for index, part in enumerate(assignment) if part == each] for each in set(assignment)]
        return len(groups) if all(map(fits, groups)) else len(lengths)

    fewest = min(count(assignment) for assignment in product(range(len(lengths)), repeat=len(lengths)))
    assert len(split_padded(lengths, max_tokens=limit)) == fewest


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), slack=st.integers(0, 100))
def test_filled_batches_keep_the_limit_and_no_two_fit_together(lengths: list[int], slack: int) -> None:
    limit = max(lengths) + slack
    groups = fill_batches(lengths, max_tokens=limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    totals = sorted(sums(groups, lengths))
    assert totals[-1] <= limit
    assert len(totals) == 1 or totals[0] + totals[1] > limit


def test_best_fit_decreasing_hand_worked_case() -> None:
    # 60 opens a group with room 40, 50 one with 50; 40 fits the first exactly, 30 and 20 fill the second.
    assert fill_batches([60, 50, 40, 30, 20], max_tokens=100) == [[0, 2], [1, 3, 4]]


def test_attention_is_half_of_the_work_at_the_crossover() -> None:
    # A Llama-like layer of width 4: q, k, v and o 4 x 16, an MLP of 3 x 4 x 8, one head of 4.
    crossover = attention_crossover(parameters_per_layer=4 * 16 + 3 * 4 * 8, attention_size=4)
    assert crossover == 40
    # One sample of 40 tokens: 40 x 160 in matrix products and 2 x 4 for each of 40 x 40 / 2 pairs.
    assert 40 * 160 == 2 * 4 * 40 * 40 // 2
    assert compute_workload(40, crossover=crossover) == 2 * 40 * crossover
