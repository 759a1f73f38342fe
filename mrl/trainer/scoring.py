"""Rewards for the samples of all ranks, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mrl.interfaces import RewardFn
from mrl.parallel.agreement import broadcast_result, share_out
from mrl.rollout.batch import Decoder, decode_responses
from mrl.types import Sample


class Scorer:
    """Decodes samples on all ranks, scores them on one and gives every rank the scores."""

    def __init__(
        self, reward_fn: RewardFn | None, tokenizer: Decoder, *, source_rank: int, texts_everywhere: bool = False
    ) -> None:
        """
        Args:
            texts_everywhere: whether every rank gets the texts, and not `source_rank` alone.
        """
        self._reward_fn = reward_fn
        self._tokenizer = tokenizer
        self._source_rank = source_rank
        self._texts_everywhere = texts_everywhere

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with `reward` and `reward_info` set, and `response_text` where texts are wanted.

        Called by all ranks with the same samples. A RewardError is raised on every rank.
        """
        texts = share_out(
            lambda share: decode_responses(share, self._tokenizer),
            samples,
            only_to=None if self._texts_everywhere else self._source_rank,
        )
        if texts:
            samples = [replace(sample, response_text=text) for sample, text in zip(samples, texts, strict=True)]
        scores = broadcast_result(lambda: self._compute(samples), source_rank=self._source_rank)
        return [
            replace(sample, reward=reward, reward_info=info)
            for sample, (reward, info) in zip(samples, scores, strict=True)
        ]

    def _compute(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        assert self._reward_fn is not None, "the source rank has no reward function"
        return self._reward_fn(samples)

    def close(self) -> None:
        """Stop the reward function's workers."""
        if self._reward_fn is not None:
            self._reward_fn.close()
