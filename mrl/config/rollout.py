"""Settings of generation: section `actor_rollout_ref.rollout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrl.config.checks import at_least, more_than, not_both, within
from mrl.config.errors import ConfigError
from mrl.config.frozen import FrozenDict
from mrl.config.megatron import Dtype
from mrl.config.section import Section


@dataclass(kw_only=True, frozen=True)
class ValKwargsConfig(Section):
    """Sampling during validation."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = -1
    """Sample from this many likeliest tokens; -1 is all."""
    n: int = 1
    """Responses per prompt."""

    def check(self) -> None:
        at_least(self, 0, "temperature")
        at_least(self, 1, "n")
        _check_top(self.top_p, self.top_k)
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(f"n = {self.n} greedy responses are all the same; set temperature above 0, or n = 1")


@dataclass(kw_only=True, frozen=True)
class EngineKwargsConfig(Section):
    """Arguments handed to the engine unchanged."""

    sglang: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Fields for SGLang's ServerArgs."""


@dataclass(kw_only=True, frozen=True)
class EnvironmentConfig(Section):
    """What answers the model."""

    path: str | None = None
    """Python file; has to be set with `multi_turn.enable`."""
    name: str = "respond"
    """Function in that file: `name(messages, ground_truth, extra_info, **kwargs)` returns None to end a conversation,
    the text of a user's message, or a list of messages."""
    kwargs: Mapping[str, Any] = field(default_factory=FrozenDict)
    """Keyword arguments added to every call."""
    num_workers: int = 8
    """Processes that answer, one conversation at a time; a coroutine function answers all of a process's at once."""
    timeout_s: float = 60.0
    """Longest time for one call, in seconds; a slower one counts as a failure."""
    on_failure: Literal["end", "raise"] = "end"
    """A call that fails ends its conversation (`rollout/environment_failed`), or the run. Where 16 or more are made and
    every one fails, the run ends in either case."""

    def check(self) -> None:
        at_least(self, 1, "num_workers")
        more_than(self, 0, "timeout_s")


@dataclass(kw_only=True, frozen=True)
class MultiTurnConfig(Section):
    """Conversations: an environment answers the model, which answers again."""

    enable: bool = False
    """Have an environment answer; docs/rollout.md#conversations."""
    max_assistant_turns: int | None = None
    """Most answers of the model in a conversation; null is as many as fit `data.max_response_length`."""
    max_turn_length: int | None = None
    """Most tokens of one answer; null is `data.max_response_length` divided by `max_assistant_turns`."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What answers the model."""

    def check(self) -> None:
        at_least(self, 1, "max_assistant_turns", "max_turn_length")
        if not self.enable:
            return
        if self.environment.path is None:
            raise ConfigError("enable = True needs environment.path, a Python file with the function that answers")
        if self.max_assistant_turns is None and self.max_turn_length is None:
            raise ConfigError("enable = True needs max_assistant_turns or max_turn_length, to know when to stop")


@dataclass(kw_only=True, frozen=True)
class RolloutConfig(Section):
    """The rollout engines, which share the trainer's devices."""

    name: Literal["sglang"] = "sglang"
    """The engine."""
    mode: Literal["sync", "async"] = "async"
    """Accepted for compatibility; engines run in-process and are fed from one queue either way."""
    num_engines: int | None = None
    """Engines of `tensor_model_parallel_size` ranks each; null is as many as fit the world."""
    tensor_model_parallel_size: int = 2
    """Ranks per engine."""
    n: int = 1
    """Responses per prompt."""
    temperature: float = 1.0
    """Sampling temperature, also that of the trainer's log-probs."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = -1
    """Sample from this many likeliest tokens; -1 is all."""
    prompt_length: int = 512
    """`data.max_prompt_length`."""
    response_length: int = 512
    """`data.max_response_length`."""
    ignore_eos: bool = False
    """Generate to the full length."""
    calculate_log_probs: bool = True
    """Return the engine's log-probs, from which the `parity/*` metrics come."""
    dtype: Dtype = "bfloat16"
    """Type of the engine's weights."""
    load_format: str = "dummy"
    """How an engine fills its weights at start; the actor's replace them before the first rollout."""
    gpu_memory_utilization: float = 0.5
    """Share of device memory for weights and KV cache (SGLang's mem_fraction_static)."""
    free_cache_engine: bool = True
    """Release the engine's memory while the trainer works."""
    alias_weights: bool = False
    """Have the engines use the actor's own memory for weights that lie there as the engine needs them, instead of a
    copy. CUDA graphs are then captured in the first step."""
    copy_engines: bool = False
    """Have the GPUs' copy engines bring large weights that lie on other GPUs of the host, instead of the kernel that
    copies the rest. Not yet run on GPUs."""
    enable_rollout_routing_replay: bool = False
    """Accepted for compatibility: engines report their tokens' experts where `actor.megatron.router_replay.mode` is R3,
    and nowhere else."""
    max_engine_restarts: int = 3
    """Most times that engines which died, or missed `trainer.engine_call_timeout_s`, are restarted in a run; their
    unfinished prompts are generated again. 0 ends the run instead."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""
    max_model_len: int | None = None
    """Longest context of an engine, in tokens; null is what a prompt and its response need."""
    max_num_seqs: int = 256
    """Most sequences an engine runs at once."""
    max_num_batched_tokens: int = 8192
    """Most prompt tokens an engine prefills at once."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Samples per forward pass of the actor's old log-probs on a data-parallel rank; has to be set without
    `log_prob_use_dynamic_bsz`."""
    log_prob_micro_batch_size: int | None = None
    """Deprecated: the same over all data-parallel ranks; divided by their number, with a warning."""
    log_prob_use_dynamic_bsz: bool = False
    """Cut those micro-batches by their number of tokens; the actor's `use_dynamic_bsz` unless set."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens per such pass on a GPU, with `log_prob_use_dynamic_bsz`; the actor's unless set."""
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    """Conversations: an environment answers the model, which answers again."""
    engine_kwargs: EngineKwargsConfig = field(default_factory=EngineKwargsConfig)
    """Arguments handed to the engine unchanged."""
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
    """Sampling during validation."""

    def check(self) -> None:
        more_than(self, 0, "temperature", "gpu_memory_utilization")
        within(self, 0, 1, "gpu_memory_utilization")
        at_least(self, 1, "n", "num_engines", "tensor_model_parallel_size", "prompt_length", "response_length")
        at_least(self, 1, "max_num_seqs", "max_num_batched_tokens")
        at_least(self, 0, "max_engine_restarts")
        at_least(self, 1, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
        at_least(self, 1, "log_prob_max_token_len_per_gpu")
        not_both(self, "log_prob_micro_batch_size_per_gpu", "log_prob_micro_batch_size")
        _check_top(self.top_p, self.top_k)
        _check_gpus_are_chosen_here(self.engine_kwargs.sglang)
        if self.alias_weights:
            _check_weights_stay(self.engine_kwargs.sglang)


def _check_gpus_are_chosen_here(engine_args: Mapping[str, Any]) -> None:
    for name in ("base_gpu_id", "gpu_id_step"):
        if name in engine_args:
            raise ConfigError(
                f"engine_kwargs.sglang.{name} = {engine_args[name]!r}: engines run on the GPUs of their own ranks; "
                "drop it"
            )


_MOVES_WEIGHTS = ("speculative_algorithm", "cpu_offload_gb", "offload_group_size", "forward_hooks", "enable_eplb")
"""SGLang's arguments that need the engine's own weights, or CUDA graphs from its start."""


def _check_weights_stay(engine_args: Mapping[str, Any]) -> None:
    for name in _MOVES_WEIGHTS:
        value = engine_args.get(name)
        if value and value != -1:
            raise ConfigError(
                f"engine_kwargs.sglang.{name} = {value!r} needs weights of the engine's own; set alias_weights=False"
            )


def _check_top(top_p: float, top_k: int) -> None:
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p} must lie in (0, 1]")
    if top_k < 1 and top_k != -1:
        raise ConfigError(f"top_k = {top_k} must be at least 1, or -1 for all tokens")
