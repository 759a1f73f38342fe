"""A reward that a function computes: one from a file, or the built-in verifiers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrl.rewards import rules
from mrl.rewards.messages import Item, Outcome
from mrl.rewards.pool import Limits, WorkerPool
from mrl.rewards.worker import FunctionSpec
from mrl.types import Sample

_MAX_WORKERS = 8


class FunctionReward:
    """A PartScorer that calls a function on each sample, in worker processes.

    The function has verl's signature, `name(data_source, solution_str, ground_truth, extra_info, **kwargs)`, may be a
    coroutine function, and returns a number or a mapping with "score"; other numbers in the mapping are its parts.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str = "compute_score",
        kwargs: Mapping[str, Any] | None = None,
        num_workers: int | None = None,
        timeout_s: float = 60.0,
        sandbox: bool = False,
        pass_environment: Sequence[str] = (),
    ) -> None:
        """Start no process yet.

        Args:
            path: Python file; None is the built-in verifiers.
            kwargs: of every call; without a file, those of `rules.compute_score`.
            num_workers: processes; None is the number of cores, at most 8.
            timeout_s: wall-clock limit for one sample. Importing files and libraries is not counted.
            sandbox, pass_environment: as in `Limits`.

        Raises:
            ValueError: an argument is out of range.
        """
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers = {num_workers} must be at least 1")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s = {timeout_s} must be a positive number of seconds")
        self._file = None if path is None else str(Path(path).expanduser().resolve())
        self._kwargs = dict(kwargs or {})
        self._pool = WorkerPool(
            FunctionSpec(path=self._file, name=name, kwargs=self._kwargs),
            Limits(timeout_s=timeout_s, sandbox=sandbox, pass_environment=tuple(pass_environment)),
            num_workers=num_workers or min(_MAX_WORKERS, os.cpu_count() or 1),
        )

    def check_function(self) -> None:
        """Raise ValueError if the file is missing or does not import, or has no such function; starts a worker."""
        if self._file is not None:
            self._pool.check_function()

    def score(self, samples: Sequence[Sample], *, stop_at_failure: bool) -> list[Outcome]:
        """The outcome of each sample.

        Raises:
            ValueError: a data source has no built-in verifier.
        """
        if self._file is None and "verifier" not in self._kwargs:
            sources = {sample.prompt.data_source for sample in samples}
            rules.check_data_sources(sources, self._kwargs.get("verifiers"))
        return self._pool.score([_build_item(sample) for sample in samples], stop_at_failure=stop_at_failure)

    def close(self) -> None:
        """End the worker processes; idempotent."""
        self._pool.close()


def _build_item(sample: Sample) -> Item:
    """Of a conversation the last answer; what the environment has said is none of the model's."""
    prompt = sample.prompt
    if not sample.turns:
        return Item(prompt.data_source, sample.response_text, prompt.ground_truth, prompt.extra_info)
    extra_info = {**prompt.extra_info, "turns": list(sample.turns)}
    return Item(prompt.data_source, sample.turns[-1]["content"], prompt.ground_truth, extra_info)
