"""Data that travels between the stages of a training step.

Shape legend, used everywhere: B samples, T padded tokens, N packed tokens, V vocabulary, V/tp its local shard.

Alignment, used everywhere: entry [b, t] of a per-token tensor belongs to token t of sample b. Its log-prob is that of
token t given the tokens before it, its value is the critic's estimate before token t was emitted. Samples are stored
left-aligned (prompt, response, padding), so a causal model needs no padding mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One row of the data set, tokenized with its chat template."""

    uid: str
    """Stable over epochs: file and row."""
    token_ids: Sequence[int]
    messages: list[dict[str, Any]]
    data_source: str
    """Names the task; rule-based rewards are chosen by it."""
    ground_truth: Any = None
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class SamplingParams:
    """How an engine samples one response; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    return_routed_experts: bool = False
    """Whether an engine that was started for it reports the experts of every token."""


FinishReason = Literal["stop", "length", "abort"]


@dataclass(kw_only=True, slots=True)
class Generation:
    """What an engine returns for one prompt."""

    response_ids: Sequence[int]
    """An `array("i")` where an engine generated them: a list of as many Python numbers takes ten times the memory."""
    rollout_log_probs: Sequence[float]
    """One per response token, natural log, of the distribution before top-p/top-k, at the sampling temperature; an
    `array("f")` likewise."""
    finish_reason: FinishReason
    weight_version: int
    response_mask: Sequence[int] | None = None
    """Of a conversation: one per response token, 0 where the environment wrote it, else 1; None is all 1. An
    `array("b")` likewise."""
    routed_experts: Tensor | None = None
    """[prompt + response - 1, layers k] uint8 or int16, where asked for: the k experts to which the engine sent each
    token, layer by layer. The last token has none: the engine never runs it."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """A prompt with one response and, once scored, its reward."""

    prompt: Prompt
    generation: Generation
    response_text: str = ""
    """Set when the sample is scored: on the rank that scores and, where a reward model reads it, on all."""
    turns: Sequence[dict[str, Any]] = ()
    """Of a conversation: its messages after the prompt's, by turns the model's and the environment's."""
    reward: float | None = None
    reward_info: dict[str, float] = field(default_factory=dict)
    baseline: float | None = None
    """Reward of the greedy response to the same prompt, where the advantages need it."""


@dataclass(kw_only=True)
class TrainBatch:
    """Samples as padded CPU tensors; later stages fill in the optional fields."""

    tokens: Tensor
    """[B, T] int64, right padded."""
    lengths: Tensor
    """[B] int64, prompt plus response."""
    loss_mask: Tensor
    """[B, T] bool, True on tokens that are trained."""
    rollout_log_probs: Tensor | None = None
    """[B, T] float32, from the engine that sampled; 0 outside the response."""
    old_log_probs: Tensor | None = None
    """[B, T] float32, from the trainer before the first update of this step."""
    ref_log_probs: Tensor | None = None
    """[B, T] float32, from the reference model."""
    values: Tensor | None = None
    """[B, T] float32, from the critic before the first update of this step."""
    advantages: Tensor | None = None
    """[B, T] float32."""
    returns: Tensor | None = None
    """[B, T] float32, the critic's regression target."""
    rollout_is_weights: Tensor | None = None
    """[B, T] float32, from rollout correction: what the actor's policy loss of each token is multiplied with."""
    accepted: Tensor | None = None
    """[B, T] bool, from rollout correction: False on tokens that the actor's loss leaves out. Advantages and the
    critic see `loss_mask` alone."""
    routed_experts: Sequence[Tensor] | None = None
    """Of each sample, as `Generation.routed_experts`; unlike the tensors, neither padded nor ever copied."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, indices: Sequence[int] | Tensor | slice) -> TrainBatch:
        """The samples at `indices`, in that order, with the same padded width; a slice of them shares their memory."""
        index = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.long)
        selected = self.map_tensors(lambda tensor: tensor[index])
        if self.routed_experts is None:
            return selected
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return replace(selected, routed_experts=[self.routed_experts[sample] for sample in chosen])

    def trim(self, multiple: int = 1) -> TrainBatch:
        """The same samples cut to the longest of them, rounded up to `multiple` tokens (padding with zeros)."""
        width = -(-int(self.lengths.max()) // multiple) * multiple

        def cut(tensor: Tensor) -> Tensor:
            if tensor.dim() < 2:
                return tensor
            short = width - tensor.shape[1]
            return torch.nn.functional.pad(tensor, (0, short)) if short > 0 else tensor[:, :width]

        return self.map_tensors(cut)

    def required(self, name: str) -> Tensor:
        """The named field; raises ValueError if no earlier stage has filled it in."""
        tensor = getattr(self, name)
        if tensor is None:
            raise ValueError(f"TrainBatch.{name} is needed here, and no earlier stage has filled it in")
        return tensor

    def with_fields(self, **tensors: Tensor | None) -> TrainBatch:
        """A copy with the named fields replaced."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        """A copy with `function` of every tensor that has a row for each sample."""
        present = {item.name: getattr(self, item.name) for item in fields(self)}
        return self.with_fields(
            **{name: function(tensor) for name, tensor in present.items() if isinstance(tensor, Tensor)}
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class MicroBatchLimit:
    """The most that one data-parallel rank runs at once: a number of samples or a number of tokens."""

    samples: int | None = None
    tokens: int | None = None
    """Counted as they are computed: with its padding, where a micro-batch is padded to its longest sample."""

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError(f"a micro-batch is limited by samples = {self.samples} or tokens = {self.tokens}; set one")
        if (self.samples or self.tokens or 0) < 1:
            raise ValueError(f"a micro-batch of samples = {self.samples}, tokens = {self.tokens} must be at least 1")


Reduction = Literal["sum", "max", "min"]


@dataclass(slots=True, frozen=True)
class Metric:
    """One micro-batch's contribution to a logged number, and how contributions combine.

    A mean is a "sum" whose contributions are already divided by the denominator of the whole mini-batch.
    """

    value: Tensor
    """Scalar float32."""
    reduction: Reduction = "sum"
