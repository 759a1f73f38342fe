"""Plans of micro-batches: what each must keep, and how far from the best it can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl.parallel.balancing import compute_workload
from mrl.parallel.microbatches import PlanRules, plan_micro_batches
from mrl.types import MicroBatchLimit

RULES = st.builds(
    PlanRules,
    dp_size=st.integers(1, 5),
    count_multiple=st.integers(1, 4),
    packed=st.booleans(),
    crossover=st.sampled_from([0, 30, 10_000]),
)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def plan_all(lengths: list[int], *, limit: MicroBatchLimit, rules: PlanRules) -> list[list[list[int]]]:
    """[dp_rank][micro-batch] -> sample indices."""
    return [plan_micro_batches(lengths, limit=limit, rules=rules, dp_rank=rank) for rank in range(rules.dp_size)]


def check_complete(plan: list[list[list[int]]], lengths: list[int], rules: PlanRules) -> None:
    """Every sample once, in equally many micro-batches on every rank."""
    placed = itertools.chain.from_iterable(itertools.chain.from_iterable(plan))
    assert sorted(placed) == list(range(len(lengths)))
    assert len(plan) == rules.dp_size
    assert len({len(share) for share in plan}) == 1
    assert len(plan[0]) % rules.count_multiple == 0


def computed_tokens(lengths: list[int], indices: list[int], rules: PlanRules) -> int:
    if rules.packed:
        return sum(lengths[index] for index in indices)
    return len(indices) * max((lengths[index] for index in indices), default=0)


def cost(lengths: list[int], indices: list[int], rules: PlanRules) -> int:
    if rules.packed:
        return sum(compute_workload(lengths[index], crossover=rules.crossover) for index in indices)
    longest = max((lengths[index] for index in indices), default=0)
    return len(indices) * compute_workload(longest, crossover=rules.crossover)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, rules=RULES, samples=st.integers(1, 6))
def test_plans_by_samples_are_complete_and_no_longer_than_needed(lengths, rules, samples) -> None:
    plan = plan_all(lengths, limit=MicroBatchLimit(samples=samples), rules=rules)
    check_complete(plan, lengths, rules)
    # One fewer, or one multiple fewer, would not hold all samples.
    assert (len(plan[0]) - rules.count_multiple) * rules.dp_size * samples < len(lengths)
    assert max(len(indices) for share in plan for indices in share) <= samples


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, rules=RULES, slack=st.integers(0, 100))
def test_plans_by_tokens_are_complete_and_within_the_limit(lengths, rules, slack) -> None:
    limit = max(lengths) + slack
    plan = plan_all(lengths, limit=MicroBatchLimit(tokens=limit), rules=rules)
    check_complete(plan, lengths, rules)
    for share in plan:
        tokens = [computed_tokens(lengths, indices, rules) for indices in share]
        assert max(tokens) <= limit
        assert tokens == sorted(tokens, reverse=True)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, rules=RULES, slack=st.integers(0, 100), by_tokens=st.booleans())
def test_no_rank_has_more_than_its_share_and_one_more_piece(lengths, rules, slack, by_tokens) -> None:
    limit = MicroBatchLimit(tokens=max(lengths) + slack) if by_tokens else MicroBatchLimit(samples=1 + slack % 6)
    plan = plan_all(lengths, limit=limit, rules=rules)
    shares = [sum(cost(lengths, indices, rules) for indices in share) for share in plan]
    pieces = [[index] for index in range(len(lengths))] if rules.packed else itertools.chain.from_iterable(plan)
    assert max(shares) - min(shares) <= max(cost(lengths, list(piece), rules) for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, rules=RULES, slack=st.integers(0, 100))
def test_packed_micro_batches_are_more_than_half_full(lengths, rules, slack) -> None:
    rules = PlanRules(dp_size=rules.dp_size, packed=True, crossover=rules.crossover)
    limit = max(lengths) + slack
    plan = plan_all(lengths, limit=MicroBatchLimit(tokens=limit), rules=rules)
    fullest = max(sum(lengths[index] for indices in share for index in indices) for share in plan)
    assert len(plan[0]) <= 2 * fullest // limit + 1


def test_padded_plans_balance_and_group_like_lengths() -> None:
    rules = PlanRules(dp_size=2, crossover=10**6)
    plan = plan_all([8, 1, 7, 2, 6, 3, 5, 4], limit=MicroBatchLimit(samples=2), rules=rules)
    # In order of length: (8, 7), (6, 5), (4, 3), (2, 1), padded to 16, 12, 8 and 4 tokens; 16 + 4 and 12 + 8 balance.
    assert plan == [[[0, 2], [3, 1]], [[4, 6], [7, 5]]]


def test_packed_plans_balance_attention_too() -> None:
    lengths = [40, 10, 10, 10, 10, 10, 10]
    linear = PlanRules(dp_size=2, packed=True, crossover=10**6)
    attention = PlanRules(dp_size=2, packed=True, crossover=0)
    limit = MicroBatchLimit(tokens=100)
    # By tokens the long sample is 4 of 10; by attention it is 16 of 22, more than all others.
    assert sorted(map(len, plan_all(lengths, limit=limit, rules=linear)[0])) in ([2], [5])
    assert plan_all(lengths, limit=limit, rules=attention) == [[[0]], [[1, 2, 3, 4, 5, 6]]]


def test_the_token_limit_comes_before_the_balance_of_cost() -> None:
    # By cost alone 40 and the six 10s would be the two micro-batches, and the latter over the limit.
    rules = PlanRules(dp_size=1, packed=True, crossover=0)
    plan = plan_all([40, 10, 10, 10, 10, 10, 10], limit=MicroBatchLimit(tokens=50), rules=rules)
    assert sorted(sum([40, 10, 10, 10, 10, 10, 10][i] for i in indices) for indices in plan[0]) == [50, 50]


def test_few_samples_are_spread_over_ranks() -> None:
    for packed in (False, True):
        rules = PlanRules(dp_size=2, packed=packed)
        assert plan_all([5, 5], limit=MicroBatchLimit(samples=8), rules=rules) == [[[0]], [[1]]]
        assert plan_all([5], limit=MicroBatchLimit(tokens=8), rules=rules) == [[[0]], [[]]]


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 0 samples"):
        plan_all([], limit=MicroBatchLimit(samples=1), rules=PlanRules(dp_size=1))
    with pytest.raises(ValueError, match="a sample of 9 tokens exceeds the 8 tokens"):
        plan_all([9], limit=MicroBatchLimit(tokens=8), rules=PlanRules(dp_size=1))
    with pytest.raises(ValueError, match="set one"):
        MicroBatchLimit(samples=1, tokens=1)
    with pytest.raises(ValueError, match="must be at least 1"):
        MicroBatchLimit(tokens=0)
