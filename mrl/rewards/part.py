"""What a run's reward is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from mrl.rewards.messages import Outcome
from mrl.types import Sample

OnFailure = Literal["zero", "raise"]
"""A sample that cannot be scored gets 0 and is counted as `reward/failed`, or it ends the run."""


class PartScorer(Protocol):
    """Scores samples by one criterion; closed once."""

    def score(self, samples: Sequence[Sample], *, stop_at_failure: bool) -> list[Outcome]:
        """The outcome of each sample, in order; those not reached because another failed have outcome `SKIPPED`."""
        ...

    def close(self) -> None:
        """Stop what it started."""
        ...


@dataclass(kw_only=True, frozen=True)
class RewardPart:
    """One of a run's criteria."""

    name: str
    """Under which its score is logged, as `reward/<name>`; empty where it is the whole reward."""
    scorer: PartScorer
    weight: float = 1.0
    """Factor of its score in the sum."""
    on_failure: OnFailure = "zero"

    def __post_init__(self) -> None:
        if self.on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure = {self.on_failure!r} must be one of {', '.join(get_args(OnFailure))}")
