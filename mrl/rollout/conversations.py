"""Rollouts in which an environment answers the model, turn by turn.

All conversations of a batch take a turn at the same time: the engines answer, the environment reads the answers on one
rank, and what it adds is appended, as tokens, on all. A conversation always ends with an answer.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch.distributed as dist

from mrl.interfaces import EnvironmentFailedError, Rollout
from mrl.parallel.agreement import broadcast_result, share_out
from mrl.rewards.messages import Conversation, Outcome
from mrl.rewards.pool import SKIPPED
from mrl.rollout.environment import Environment
from mrl.types import Generation, Prompt, Sample, SamplingParams

logger = logging.getLogger(__name__)

_NO_ACCIDENT = 16
"""Where so many calls fail and none does not, the environment is broken."""
_LONGEST_TOKEN = 32
"""Characters; text that is longer for each token that there is room for is not encoded to find out."""


_ADDED_UP = (
    "rollout/tokens",
    "rollout/engine_s",
    "rollout/engine_restarts",
    "rollout/environment_s",
    "rollout/environment_failed",
    "rollout/environment_no_room",
)


class MessageEncoder(Protocol):
    """Between messages and tokens; see `mrl.data.turn_encoder`."""

    def encode(self, messages: Sequence[dict[str, Any]], *, last_token: int) -> list[int]: ...

    def decode(self, answer: Sequence[int], *, has_ended: bool) -> str: ...


@dataclass(kw_only=True, frozen=True)
class ConversationLimits:
    """When a conversation ends at the latest."""

    turns: int
    """Answers of the model."""
    turn_tokens: int
    """Of each of them."""
    tokens: int
    """Behind the prompt, the environment's included. There is no further turn where a whole answer would not fit."""


@dataclass(kw_only=True)
class _Dialogue:
    """One prompt's conversation so far."""

    prompt: Prompt
    response: array[int] = field(default_factory=lambda: array("i"))
    log_probs: array[float] = field(default_factory=lambda: array("f"))
    mask: array[int] = field(default_factory=lambda: array("b"))
    turns: list[dict[str, Any]] = field(default_factory=list)
    last: Generation | None = None
    num_answers: int = 0

    @property
    def answer(self) -> Generation:
        """The last one."""
        assert self.last is not None, "nothing has been generated"
        return self.last

    def next_prompt(self) -> Prompt:
        return replace(self.prompt, token_ids=array("i", self.prompt.token_ids) + self.response)

    def add_answer(self, generation: Generation) -> None:
        self._extend(generation.response_ids, generation.rollout_log_probs, trained=True)
        self.last = generation
        self.num_answers += 1

    def add_messages(self, tokens: Sequence[int]) -> None:
        self._extend(tokens, [0.0] * len(tokens), trained=False)

    def _extend(self, tokens: Sequence[int], log_probs: Sequence[float], *, trained: bool) -> None:
        self.response.extend(tokens)
        self.log_probs.extend(log_probs)
        self.mask.extend([int(trained)] * len(tokens))

    def conversation(self) -> Conversation:
        return Conversation([*self.prompt.messages, *self.turns], self.prompt.ground_truth, self.prompt.extra_info)

    def sample(self) -> Sample:
        generation = replace(
            self.answer,
            response_ids=self.response,
            rollout_log_probs=self.log_probs,
            response_mask=None if self.num_answers == 1 else self.mask,
        )
        return Sample(prompt=self.prompt, generation=generation, turns=self.turns)


@dataclass(kw_only=True, frozen=True)
class _Reply:
    """What follows an answer; without tokens nothing does."""

    messages: Sequence[dict[str, Any]] = ()
    tokens: Sequence[int] = ()
    error: str | None = None
    has_room: bool = True


class ConversationRollout:
    """Implements `mrl.interfaces.Rollout` over another, whose generations become the turns of conversations.

    Args:
        environment: on `source_rank`; None elsewhere.
        on_failure: whether a conversation that cannot be answered ends, or the run does. Where 16 or more cannot and
            none can, the run does.
    """

    def __init__(
        self,
        rollout: Rollout,
        environment: Environment | None,
        encoder: MessageEncoder,
        limits: ConversationLimits,
        *,
        on_failure: Literal["end", "raise"] = "end",
        source_rank: int = 0,
    ) -> None:
        self._rollout = rollout
        self._environment = environment
        self._encoder = encoder
        self._limits = limits
        self._ends_run = on_failure == "raise"
        self._source_rank = source_rank
        self.metrics: dict[str, float] = {}
        """Of the last `generate`: the engines' over all turns, and what the environment did."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the engines have."""
        return self._rollout.weight_version

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """One conversation for each prompt, in order, on every rank.

        Raises:
            EnvironmentFailedError: the environment failed where that ends the run. Raised on all ranks.
            EngineError, ValueError: as the engines' own `generate`.
        """
        begin = time.perf_counter()
        dialogues = [_Dialogue(prompt=prompt) for prompt in prompts]
        self.metrics = dict.fromkeys(_ADDED_UP, 0.0)
        running: Sequence[_Dialogue] = dialogues
        while running:
            self._answer(running, params)
            asked = time.perf_counter()
            running = self._reply(running)
            self.metrics["rollout/environment_s"] += time.perf_counter() - asked
        self.metrics["rollout/tokens_per_s"] = self.metrics["rollout/tokens"] / (time.perf_counter() - begin)
        return [dialogue.sample() for dialogue in dialogues]

    def _answer(self, running: Sequence[_Dialogue], params: SamplingParams) -> None:
        """Have the engines answer every conversation."""
        turn = replace(params, max_new_tokens=min(params.max_new_tokens, self._limits.turn_tokens))
        samples = self._rollout.generate([dialogue.next_prompt() for dialogue in running], turn)
        for dialogue, sample in zip(running, samples, strict=True):
            dialogue.add_answer(sample.generation)
        for key in self.metrics.keys() & self._rollout.metrics.keys():
            self.metrics[key] += self._rollout.metrics[key]

    def _reply(self, running: Sequence[_Dialogue]) -> list[_Dialogue]:
        """Have the environment answer; the conversations that go on."""
        for dialogue, text in zip(running, share_out(self._decode, running), strict=True):
            dialogue.turns.append({"role": "assistant", "content": text})
        open_ones = [dialogue for dialogue in running if self._may_go_on(dialogue)]
        outcomes = broadcast_result(lambda: self._ask(open_ones), source_rank=self._source_rank)
        replies = share_out(self._encode, list(zip(open_ones, outcomes, strict=True)))
        self._report([reply.error for reply in replies])
        self.metrics["rollout/environment_no_room"] += sum(not reply.has_room for reply in replies)
        going_on = [(dialogue, reply) for dialogue, reply in zip(open_ones, replies, strict=True) if reply.tokens]
        for dialogue, reply in going_on:
            dialogue.turns += reply.messages
            dialogue.add_messages(reply.tokens)
        return [dialogue for dialogue, _ in going_on]

    def _may_go_on(self, dialogue: _Dialogue) -> bool:
        has_turns = dialogue.answer.finish_reason == "stop" and dialogue.num_answers < self._limits.turns
        return has_turns and self._room(dialogue) > 0

    def _room(self, dialogue: _Dialogue) -> int:
        """Tokens that the environment may add, so that another answer fits."""
        return self._limits.tokens - self._limits.turn_tokens - len(dialogue.response)

    def _decode(self, share: Sequence[_Dialogue]) -> list[str]:
        return [
            self._encoder.decode(each.answer.response_ids, has_ended=each.answer.finish_reason == "stop")
            for each in share
        ]

    def _ask(self, open_ones: Sequence[_Dialogue]) -> list[Outcome]:
        assert self._environment is not None, "the source rank has no environment"
        return self._environment.respond([each.conversation() for each in open_ones]) if open_ones else []

    def _encode(self, share: Sequence[tuple[_Dialogue, Outcome]]) -> list[_Reply]:
        return [self._encode_one(dialogue, outcome) for dialogue, outcome in share]

    def _encode_one(self, dialogue: _Dialogue, outcome: Outcome) -> _Reply:
        if outcome.messages is None:
            return _Reply(error=outcome.error)
        room = self._room(dialogue)
        if sum(len(message["content"]) for message in outcome.messages) > _LONGEST_TOKEN * room:
            return _Reply(has_room=False)
        try:
            tokens = self._encoder.encode(outcome.messages, last_token=dialogue.response[-1])
        except Exception as error:
            # The messages are a user's, and templates and tokenizers raise what they like.
            return _Reply(error=f"returned what cannot be encoded: {type(error).__name__}: {error}")
        return _Reply(messages=outcome.messages, tokens=tokens) if len(tokens) <= room else _Reply(has_room=False)

    def _report(self, errors: Sequence[str | None]) -> None:
        """Count failures; the same on all ranks.

        Raises:
            EnvironmentFailedError: they end the run.
        """
        failures = [error for error in errors if error]
        self.metrics["rollout/environment_failed"] += len(failures)
        if not failures:
            return
        first = next((error for error in failures if error != SKIPPED.error), failures[0])
        message = f"the environment failed in {len(failures)} of {len(errors)} conversations; in the first it {first}"
        if self._ends_run or len(failures) == len(errors) >= _NO_ACCIDENT:
            raise EnvironmentFailedError(message)
        if not dist.is_initialized() or dist.get_rank() == self._source_rank:
            logger.warning("%s", message)

    def update_weights(self) -> dict[str, float]:
        """Reshard the actor's current weights into every engine."""
        return self._rollout.update_weights()

    def release_memory(self, tags: Sequence[str]) -> None:
        """Have every engine give up its memory of `tags`."""
        self._rollout.release_memory(tags)

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Have every engine take that memory again."""
        self._rollout.resume_memory(tags)

    def close(self) -> None:
        """Stop the environment and this rank's engine."""
        if self._environment is not None:
            self._environment.close()
        self._rollout.close()
