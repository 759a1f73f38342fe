"""Rollouts in which an environment answers the model, turn by turn.

All conversations of a batch take a turn at the same time: the engines answer, the environment reads the answers on one
rank, and what it adds is appended, as tokens, on all. Engines keep the keys and values of what they have seen, so that
a turn costs the tokens that it adds. A conversation always ends with an answer.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from mrl.interfaces import Rollout
from mrl.parallel.agreement import broadcast_result
from mrl.rewards.messages import Conversation, Outcome
from mrl.rollout.environment import Environment
from mrl.types import Generation, Prompt, Sample, SamplingParams


class MessageEncoder(Protocol):
    """Between messages and tokens; see `mrl.data.turn_encoder`."""

    def encode(self, messages: Sequence[dict[str, Any]], *, last_token: int) -> list[int]: ...

    def decode(self, answer: Sequence[int]) -> str: ...


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
        return replace(self.prompt, token_ids=[*self.prompt.token_ids, *self.response])

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

    def conversation(self, answer: str) -> Conversation:
        messages = [*self.prompt.messages, *self.turns, {"role": "assistant", "content": answer}]
        return Conversation(messages, self.prompt.ground_truth, self.prompt.extra_info)

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
    """What becomes of a conversation after an answer."""

    answer: str
    messages: list[dict[str, Any]] | None = None
    """None ends it."""
    tokens: list[int] = field(default_factory=list)
    failed: bool = False


class ConversationRollout:
    """Implements `mrl.interfaces.Rollout` over another, whose generations become the turns of conversations.

    Args:
        environment: on `source_rank`; None elsewhere.
    """

    def __init__(
        self,
        rollout: Rollout,
        environment: Environment | None,
        encoder: MessageEncoder,
        limits: ConversationLimits,
        *,
        source_rank: int = 0,
    ) -> None:
        self._rollout = rollout
        self._environment = environment
        self._encoder = encoder
        self._limits = limits
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
        turn = replace(params, max_new_tokens=min(params.max_new_tokens, self._limits.turn_tokens))
        metrics = dict.fromkeys(("rollout/tokens", "rollout/engine_s", "rollout/engine_restarts"), 0.0)
        metrics |= {"rollout/environment_s": 0.0, "rollout/environment_failed": 0.0}
        running = dialogues
        while running:
            samples = self._rollout.generate([dialogue.next_prompt() for dialogue in running], turn)
            for dialogue, sample in zip(running, samples, strict=True):
                dialogue.add_answer(sample.generation)
            asked = time.perf_counter()
            replies = broadcast_result(partial(self._ask, running), source_rank=self._source_rank)
            metrics |= {key: metrics[key] + value for key, value in self._rollout.metrics.items() if key in metrics}
            metrics["rollout/environment_s"] += time.perf_counter() - asked
            metrics["rollout/environment_failed"] += sum(reply.failed for reply in replies)
            running = [each for each, reply in zip(running, replies, strict=True) if self._goes_on(each, reply)]
        metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / (time.perf_counter() - begin)
        self.metrics = metrics
        return [dialogue.sample() for dialogue in dialogues]

    def _ask(self, running: Sequence[_Dialogue]) -> list[_Reply]:
        """What follows each conversation's last answer; on the source rank."""
        assert self._environment is not None, "the source rank has no environment"
        answers = [self._encoder.decode(dialogue.answer.response_ids) for dialogue in running]
        open_ones = [place for place, dialogue in enumerate(running) if self._may_go_on(dialogue)]
        asked = [running[place].conversation(answers[place]) for place in open_ones]
        outcomes = self._environment.respond(asked) if asked else []
        of_place = dict(zip(open_ones, outcomes, strict=True))
        return [
            self._reply(dialogue, answer, of_place.get(place))
            for place, (dialogue, answer) in enumerate(zip(running, answers, strict=True))
        ]

    def _reply(self, dialogue: _Dialogue, answer: str, outcome: Outcome | None) -> _Reply:
        if outcome is None or outcome.messages is None:
            return _Reply(answer=answer, failed=outcome is not None and outcome.error is not None)
        tokens = self._encoder.encode(outcome.messages, last_token=dialogue.response[-1])
        return _Reply(answer=answer, messages=outcome.messages, tokens=tokens)

    def _may_go_on(self, dialogue: _Dialogue) -> bool:
        return dialogue.answer.finish_reason == "stop" and dialogue.num_answers < self._limits.turns

    def _goes_on(self, dialogue: _Dialogue, reply: _Reply) -> bool:
        """Take the reply up; whether there is a further turn."""
        dialogue.turns.append({"role": "assistant", "content": reply.answer})
        needed = len(dialogue.response) + len(reply.tokens) + self._limits.turn_tokens
        if not reply.messages or needed > self._limits.tokens:
            return False
        dialogue.turns += reply.messages
        dialogue.add_messages(reply.tokens)
        return True

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
