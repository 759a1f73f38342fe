"""Scores of a reward model, computed while the trainer has the devices."""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from mrl.interfaces import RewardError, TrainEngine
from mrl.parallel.agreement import share_out
from mrl.trainer.phases import PhaseSwitch
from mrl.types import MicroBatchLimit, Sample, TrainBatch

logger = logging.getLogger(__name__)

NAME = "reward_model"


@dataclass(kw_only=True, frozen=True)
class ConversationEncoder:
    """Prompt and response as the reward model reads them: in its own chat template and tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """In tokens."""
    pad_token_id: int | None
    """Of the model's config.json; the score is read at the last token that is another."""

    def encode(self, sample: Sample) -> list[int]:
        """Token ids of the conversation, ended by the answer; may be too long.

        Raises:
            ValueError: the template refuses the conversation.
        """
        answers = sample.turns or ({"role": "assistant", "content": sample.response_text},)
        turns = [*sample.prompt.messages, *answers]
        try:
            return list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
        except Exception as error:
            raise ValueError(
                f"row {sample.prompt.uid}: the reward model's chat template failed: {type(error).__name__}: {error}"
            ) from error

    def scored_position(self, token_ids: Sequence[int]) -> int:
        """Where transformers' classifiers read the score: the last token that is not padding."""
        for position in range(len(token_ids) - 1, 0, -1):
            if token_ids[position] != self.pad_token_id:
                return position
        return 0


def load_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> ConversationEncoder:
    """The encoder of a reward model's folder.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"reward.reward_model: the tokenizer of {folder} has no chat template to write conversations in; add "
            "chat_template.jinja to the folder"
        )
    pad_token_id = json.loads((folder / "config.json").read_text()).get("pad_token_id")
    return ConversationEncoder(tokenizer=tokenizer, max_length=max_length, pad_token_id=pad_token_id)


@dataclass(kw_only=True)
class RewardModelStage:
    """Adds the model's scores to the rewards of samples. Called by all ranks with the same samples."""

    engine: TrainEngine
    encoder: ConversationEncoder
    limit: MicroBatchLimit
    weight: float
    on_failure: Literal["zero", "raise"]

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with `reward_model` in their `reward_info` and its share in their reward.

        Raises:
            RewardError: a conversation is too long or its score not finite, and that ends the run. On all ranks.
        """
        conversations = share_out(lambda share: [array("i", self.encoder.encode(each)) for each in share], samples)
        fitting = [row for row, ids in enumerate(conversations) if 0 < len(ids) <= self.encoder.max_length]
        scores = dict(zip(fitting, self._compute([conversations[row] for row in fitting]), strict=True))
        failed = [row for row in range(len(samples)) if not math.isfinite(scores.get(row, math.nan))]
        if failed:
            self._report(samples, failed, len(conversations[failed[0]]))
        return [
            self._add(sample, 0.0 if row in set(failed) else scores[row], failed=row in set(failed))
            for row, sample in enumerate(samples)
        ]

    def score_between_rollouts(self, samples: Sequence[Sample], phases: PhaseSwitch) -> list[Sample]:
        """The same while the engines have the devices; they have them again afterwards."""
        phases.to_training()
        scored = self.score(samples)
        phases.to_rollout()
        # Whoever asked for the scores counts their time: none of it is the next step's.
        phases.timer.take()
        return scored

    def _compute(self, conversations: Sequence[Sequence[int]]) -> list[float]:
        """The classifier's output for each conversation."""
        if not conversations:
            return []
        # The value of entry t belongs to the token before it, so one more token shows the last one's.
        width = max(map(len, conversations)) + 1
        tokens = torch.zeros(len(conversations), width, dtype=torch.int64)
        for row, token_ids in enumerate(conversations):
            tokens[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        lengths = torch.tensor([len(token_ids) + 1 for token_ids in conversations])
        batch = TrainBatch(tokens=tokens, lengths=lengths, loss_mask=torch.zeros_like(tokens, dtype=torch.bool))
        values = self.engine.compute_values(batch, limit=self.limit)
        self.engine.offload()
        positions = torch.tensor([self.encoder.scored_position(token_ids) for token_ids in conversations])
        return values[torch.arange(len(conversations)), positions + 1].tolist()

    def _report(self, samples: Sequence[Sample], failed: Sequence[int], length: int) -> None:
        first = (
            f"the reward model has no finite score for sample {samples[failed[0]].prompt.uid!r}, whose conversation "
            f"has {length} of its tokens (at most {self.encoder.max_length})"
        )
        if self.on_failure == "raise":
            raise RewardError(f"{first}; shorten it, or have failures score 0 with reward.on_failure=zero")
        logger.warning("%d of %d samples could not be scored: score 0; first: %s", len(failed), len(samples), first)

    def _add(self, sample: Sample, score: float, *, failed: bool) -> Sample:
        info = {**sample.reward_info, NAME: score}
        if self.on_failure == "zero":
            info[f"{NAME}/failed"] = float(failed)
            info["failed"] = max(float(failed), info.get("failed", 0.0))
        return replace(sample, reward=(sample.reward or 0.0) + self.weight * score, reward_info=info)
