"""A reward that a language model gives: a generative judge behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import openai

from mrl.rewards.json_schema import parse_json
from mrl.rewards.messages import Outcome
from mrl.rewards.pool import SKIPPED
from mrl.types import Sample

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 20.0


class NoScoreError(ValueError):
    """The judge's answer holds no score; the message is the end of a sentence about the sample."""


@dataclass(kw_only=True, frozen=True)
class ScoreFormat:
    """Where the score stands in the judge's answer: one of the two is set."""

    regex: str | None = None
    """Its first group is the number; of several matches the last counts."""
    schema: Mapping[str, Any] | None = None
    """JSON Schema of an answer that is an object with a number `score`; its other numbers are logged, too."""
    minimum: float | None = None
    maximum: float | None = None
    """A score outside is none: a judge that answers 100 on a scale of 10 has not understood."""

    def read(self, answer: str) -> Outcome:
        """The score in an answer; raises NoScoreError."""
        score, parts = self._read_json(answer) if self.regex is None else (self._read_match(answer), {})
        if (self.minimum is not None and score < self.minimum) or (self.maximum is not None and score > self.maximum):
            raise NoScoreError(f"got the score {score:g}, which is outside [{self.minimum}, {self.maximum}]")
        return Outcome(score, parts)

    def _read_match(self, answer: str) -> float:
        assert self.regex is not None
        matches = list(re.finditer(self.regex, answer, flags=re.DOTALL))
        if not matches:
            raise NoScoreError(f"got an answer without {self.regex!r}: {_shorten(answer)}")
        try:
            return float(matches[-1][1])
        except (TypeError, ValueError) as error:
            raise NoScoreError(f"got {matches[-1][1]!r} for a score, which is no number") from error

    def _read_json(self, answer: str) -> tuple[float, dict[str, float]]:
        try:
            document = parse_json(answer)
            jsonschema.validate(document, dict(self.schema or {}))
        except jsonschema.ValidationError as error:
            raise NoScoreError(f"got JSON that breaks the schema: {error.message}") from error
        except ValueError as error:
            raise NoScoreError(f"got an answer that is not JSON ({error}): {_shorten(answer)}") from error
        numbers = document if isinstance(document, dict) else {}
        numbers = {key: float(value) for key, value in numbers.items() if _is_number(value)}
        if "score" not in numbers:
            raise NoScoreError(f"got JSON without a number 'score': {_shorten(answer)}")
        return numbers.pop("score"), numbers


@dataclass(kw_only=True, frozen=True)
class JudgeSettings:
    """One judge: where it is, what it is asked, and how its answer is read."""

    url: str
    """Of the endpoint's API, such as http://host:30000/v1."""
    prompt_template: str
    """User message; {prompt}, {response} and {ground_truth} are replaced, {{ and }} are braces."""
    score: ScoreFormat
    model: str | None = None
    """Name at the endpoint; None is the first that it serves."""
    system_prompt: str | None = None
    api_key_env: str | None = None
    """Environment variable with the endpoint's token; None sends none."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    max_concurrent: int = 64
    """Requests under way at a time."""
    max_retries: int = 2
    """Further attempts after a refused connection, a timeout, or a status of 408, 409, 429 or 5xx."""
    timeout_s: float = 60.0
    """Longest time for one sample, with its retries; waiting for a free slot is not counted."""
    request_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request, for example `response_format`."""


def find_model(settings: JudgeSettings) -> str:
    """The name of the judge at its endpoint, which has to answer.

    Raises:
        ValueError: no token in the environment, no answer, or another model than the configured one is served.
    """
    with openai.OpenAI(
        base_url=settings.url, api_key=read_api_key(settings.api_key_env), timeout=_PROBE_TIMEOUT_S, max_retries=0
    ) as client:
        try:
            served = [model.id for model in client.models.list()]
        except openai.OpenAIError as error:
            raise ValueError(
                f"the judge at {settings.url} does not answer ({_describe(error)}); start it (mrl serve-judge MODEL), "
                "or correct the address"
            ) from error
    if not served or (settings.model is not None and settings.model not in served):
        raise ValueError(f"the judge at {settings.url} serves {', '.join(served) or 'no model'}, not {settings.model}")
    return settings.model or served[0]


def read_api_key(variable: str | None) -> str:
    """The token in an environment variable; "none" without one, which endpoints without tokens ignore.

    Raises:
        ValueError: the variable is not set.
    """
    if variable is None:
        return "none"
    token = os.environ.get(variable)
    if not token:
        raise ValueError(f"the environment variable {variable} is not set; it has to hold the judge's token")
    return token


class JudgeReward:
    """A PartScorer that asks the judge about each sample, many at a time."""

    def __init__(self, settings: JudgeSettings) -> None:
        """Connect to nothing yet.

        Raises:
            ValueError: no token in the environment.
        """
        self._settings = settings
        self._api_key = read_api_key(settings.api_key_env)
        self._model = settings.model

    def score(self, samples: Sequence[Sample], *, stop_at_failure: bool) -> list[Outcome]:
        """The outcome of each sample. Runs an event loop of its own: not from a thread that has one.

        Raises:
            ValueError: the judge's name is to be asked for, and the endpoint does not answer.
        """
        self._model = self._model or find_model(self._settings)
        return asyncio.run(self._score(samples, self._model, stop_at_failure=stop_at_failure))

    def close(self) -> None:
        """Nothing is left open between calls."""

    async def _score(self, samples: Sequence[Sample], model: str, *, stop_at_failure: bool) -> list[Outcome]:
        settings = self._settings
        slots = asyncio.Semaphore(settings.max_concurrent)
        async with openai.AsyncOpenAI(
            base_url=settings.url, api_key=self._api_key, timeout=settings.timeout_s, max_retries=settings.max_retries
        ) as client:
            tasks = [asyncio.create_task(self._judge(sample, client, model, slots)) for sample in samples]
            try:
                for task in asyncio.as_completed(tasks):
                    if (await task).error is not None and stop_at_failure:
                        break
            finally:
                for unfinished in tasks:
                    unfinished.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        return [result if isinstance(result, Outcome) else SKIPPED for result in results]

    async def _judge(self, sample: Sample, client: openai.AsyncOpenAI, model: str, slots: asyncio.Semaphore) -> Outcome:
        limit_s = self._settings.timeout_s
        async with slots:
            try:
                answer = await asyncio.wait_for(self._ask(sample, client, model), limit_s)
                return self._settings.score.read(answer)
            except TimeoutError:
                return Outcome(0.0, {}, f"took the judge longer than its time limit of {limit_s:g} s")
            except openai.OpenAIError as error:
                return Outcome(0.0, {}, f"got no answer from the judge: {_describe(error)}")
            except NoScoreError as error:
                return Outcome(0.0, {}, str(error))

    async def _ask(self, sample: Sample, client: openai.AsyncOpenAI, model: str) -> str:
        settings = self._settings
        system = [] if settings.system_prompt is None else [{"role": "system", "content": settings.system_prompt}]
        response = sample.turns[-1]["content"] if sample.turns else sample.response_text
        content = settings.prompt_template.format(
            prompt=render_prompt(sample), response=response, ground_truth=sample.prompt.ground_truth
        )
        completion = await client.chat.completions.create(
            model=model,
            messages=[*system, {"role": "user", "content": content}],  # type: ignore[list-item]
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            extra_body=dict(settings.request_kwargs),
        )
        return completion.choices[0].message.content or ""


def render_prompt(sample: Sample) -> str:
    """The conversation before the last answer: a single message's text, or every turn after its role."""
    messages = [*sample.prompt.messages, *sample.turns[:-1]]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in messages)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(error: Exception) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    return f"{type(error).__name__}: {_shorten(str(error))}{cause}"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
