"""DAPO's soft punishment of responses that come close to the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mrl.types import Sample

SCORE_KEY = "score"
"""In `reward_info`: the score before the penalty."""


@dataclass(kw_only=True, frozen=True)
class OverlongPenalty:
    """Lowers rewards linearly over the last tokens before the limit.

    Source: Yu et al., arXiv:2503.14476, eq. 13, with the weight that verl gives it.
    """

    max_resp_len: int
    """Tokens of a response at which the penalty is `penalty_factor`."""
    buffer_len: int
    """Tokens before that over which it grows from 0."""
    penalty_factor: float
    log: bool
    """Report each sample's penalty, and whether it has one, as `reward/overlong_reward` and `reward/overlong`."""

    def compute(self, response_length: int) -> float:
        """What is added to the reward of a response of so many tokens; at most 0."""
        exceeding = response_length - (self.max_resp_len - self.buffer_len)
        return min(0.0, -exceeding / self.buffer_len * self.penalty_factor)

    def apply(self, samples: Sequence[Sample]) -> list[Sample]:
        """Scored samples with the penalty in their rewards and their score before it in `reward_info`."""
        return [self._apply_to(sample) for sample in samples]

    def _apply_to(self, sample: Sample) -> Sample:
        assert sample.reward is not None, "the penalty is added to a reward"
        penalty = self.compute(len(sample.generation.response_ids))
        info = {SCORE_KEY: sample.reward, **sample.reward_info}
        if self.log:
            info |= {"overlong_reward": penalty, "overlong": float(penalty < 0)}
        return replace(sample, reward=sample.reward + penalty, reward_info=info)
