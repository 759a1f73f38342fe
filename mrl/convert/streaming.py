"""Reading ahead of the writer, in order and within a budget of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

READ_AHEAD_BYTES = 192 * 2**20


def read_ahead[T](jobs: Iterable[tuple[int, Callable[[], T]]], *, budget_bytes: int = READ_AHEAD_BYTES) -> Generator[T]:
    """Results of the jobs in order, each made in a thread before it is asked for.

    Args:
        jobs: how much memory a result takes, in bytes, and what makes it. One that exceeds the budget is made alone.
    """
    pending: deque[tuple[int, Future[T]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        try:
            for num_bytes, job in jobs:
                while pending and in_flight + num_bytes > budget_bytes:
                    in_flight -= pending[0][0]
                    # Nothing here may keep what was handed out: it can be the largest tensor of the model.
                    yield pending.popleft()[1].result()
                pending.append((num_bytes, pool.submit(job)))
                in_flight += num_bytes
            while pending:
                yield pending.popleft()[1].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
