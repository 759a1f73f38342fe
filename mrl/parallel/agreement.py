"""Agreeing on a result before any rank raises: a rank that fails alone would leave the others in a collective."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist


def broadcast_result[T](compute: Callable[[], T], *, source_rank: int = 0) -> T:
    """What `compute` returns on `source_rank`, on every rank.

    Called by all ranks; only `source_rank` runs `compute`. An exception there is raised on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    outcome = _attempt(compute) if dist.get_rank() == source_rank else None
    box = [outcome]
    dist.broadcast_object_list(box, src=source_rank)
    return _unwrap([box[0]])[0]


def gather_results[T](compute: Callable[[], T]) -> list[T]:
    """What `compute` returns on each rank, in rank order, on every rank.

    Called by all ranks. If any of them failed, the lowest failing rank's exception is raised on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [compute()]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _attempt(compute))
    return _unwrap(outcomes)


def require_equal(value: str, *, place: str, message: str) -> None:
    """Raise ValueError on every rank unless all have the same `value`. Called by all ranks.

    Args:
        place: names the rank's host.
        message: what differs and what to do; the values and where they were found follow.
    """
    places: dict[str, set[str]] = {}
    for found, where in gather_results(lambda: (value, place)):
        places.setdefault(found, set()).add(where)
    if len(places) > 1:
        listed = "; ".join(f"{found} on {', '.join(sorted(where))}" for found, where in places.items())
        raise ValueError(f"{message}: {listed}")


def share_out[T, R](
    compute: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], *, only_to: int | None = None
) -> list[R]:
    """What `compute` returns for `items`, of which each rank gives it every world_size-th.

    Called by all ranks with the same items. If any of them failed, the lowest failing rank's exception is raised on
    every rank.

    Args:
        only_to: the one rank that gets the results, where they are large; the others get an empty list.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(compute(items))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    outcome = _attempt(lambda: compute(items[rank::world_size]))
    outcomes: list[Any] = [None] * world_size
    if only_to is None:
        dist.all_gather_object(outcomes, outcome)
    else:
        dist.gather_object(outcome, outcomes if rank == only_to else None, dst=only_to)
        failure = broadcast_result(lambda: next((each for each in outcomes if each[1]), None), source_rank=only_to)
        if failure or rank != only_to:
            _unwrap([failure] if failure else [])
            return []
    results: list[Any] = [None] * len(items)
    for first, share in enumerate(_unwrap(outcomes)):
        results[first::world_size] = share
    return results


def _attempt(compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives pickling, else a RuntimeError with its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _unwrap(outcomes: list[Any]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]
