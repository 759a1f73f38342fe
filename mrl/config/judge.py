"""Settings of a generative judge: section `reward.judge`."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, finite, more_than
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.section import Section

TEMPLATE_FIELDS = ("prompt", "response", "ground_truth")

_DEFAULT_TEMPLATE = """Rate how well the response answers the request, from 0 (useless) to 10 (perfect).

Request:
{prompt}

Response:
{response}

Explain in two sentences, then end with a line "Score: N"."""


@dataclass(kw_only=True, frozen=True)
class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible endpoint that scores samples; logged as `reward/judge`."""

    url: str | None = None
    """The endpoint, such as http://host:30000/v1 (`mrl serve-judge MODEL` starts one); null is no judge."""
    model: str | None = None
    """Name at the endpoint; null is the first that it serves."""
    api_key_env: str | None = None
    """Environment variable with the endpoint's token; null sends none."""
    system_prompt: str | None = None
    """Message before the judge's; null is none."""
    prompt_template: str = _DEFAULT_TEMPLATE
    """What the judge is asked, with {prompt}, {response} and {ground_truth}; braces that are text are {{ and }}."""
    score_regex: str | None = r"[Ss]core:\W*?(-?\d+(?:\.\d+)?)"
    """Its first group, in its last match in the answer, is the score; null where `score_schema` is set."""
    score_schema: Mapping[str, Any] = field(default_factory=FrozenDict)
    """JSON Schema of the answer, an object whose number `score` is the score; empty reads it by `score_regex`."""
    min_score: float | None = 0.0
    """A lower score counts as a failure; null is no bound."""
    max_score: float | None = 10.0
    """A higher score counts as a failure; null is no bound."""
    max_new_tokens: int = 512
    """Longest answer."""
    temperature: float = 0.0
    """At which the judge answers."""
    request_kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Further fields of each request, such as `top_p` or `response_format`."""
    max_concurrent: int = 64
    """Requests under way at a time."""
    max_retries: int = 2
    """Further attempts after a refused connection, a timeout or an overloaded endpoint."""
    weight: float = 1.0
    """Factor of the score in the sum of rewards; 0.1 makes 0 to 10 a reward of 0 to 1."""
    timeout_s: float | None = None
    """Longest time for one sample with its retries, in seconds; null is `reward.timeout_s`."""
    on_failure: Literal["zero", "raise"] | None = None
    """What a sample without a score costs; null is `reward.on_failure`."""

    def check(self) -> None:
        at_least(self, 1, "max_new_tokens", "max_concurrent")
        at_least(self, 0, "max_retries", "temperature")
        more_than(self, 0, "timeout_s")
        finite(self, "weight", "min_score", "max_score")
        if self.url is not None and not re.match(r"https?://[^/]+", self.url):
            raise ConfigError(f"url = {self.url} must begin with http:// or https:// and name a host")
        if self.min_score is not None and self.max_score is not None and self.min_score >= self.max_score:
            raise ConfigError(f"min_score = {self.min_score} must be below max_score = {self.max_score}")
        _check_template(self.prompt_template)
        self._check_score()

    def _check_score(self) -> None:
        if (self.score_regex is None) == (not self.score_schema):
            raise ConfigError(
                f"score_regex = {self.score_regex!r} and score_schema = {dict(self.score_schema)}: exactly one tells "
                "where the score is; set score_regex=null, or leave score_schema empty"
            )
        if self.score_regex is None:
            return
        try:
            groups = re.compile(self.score_regex).groups
        except re.error as error:
            raise ConfigError(f"score_regex = {self.score_regex!r} is not a regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(f"score_regex = {self.score_regex!r} has no group (...) around the number")


def _check_template(template: str) -> None:
    remedy = "braces that are text are written {{ and }}"
    try:
        named = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"prompt_template: {error}; {remedy}") from None
    unknown = [name for name in named if name not in TEMPLATE_FIELDS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS)
        raise ConfigError(f"prompt_template names {{{unknown[0]}}}; known are {known}, and {remedy}")
    if "response" not in named:
        raise ConfigError("prompt_template does not name {response}: the judge would not see what it judges")
