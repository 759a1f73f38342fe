"""Agreeing on a result before any rank raises: a rank that fails alone would leave the others in a collective."""

from __future__ import annotations

import pickle
from collections.abc import Callable
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
