"""A SGLang engine owned by one trainer process: token ids in, token ids and log-probs out."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.utils import MultiprocessingSerializer

from mrl.backends.sglang import weight_loader
from mrl.backends.sglang.arguments import EngineSettings, max_request_tokens
from mrl.backends.sglang.parts import EnginePart
from mrl.backends.sglang.requests import check_prompts, generation_of, pack_experts, sampling_dict
from mrl.backends.sglang.status import check_own_pairs, report_of
from mrl.backends.sglang.supervisor import EngineSupervisor
from mrl.interfaces import EngineDiedError, EngineError, TakePrompts, WeightUpdateReport, update_round
from mrl.types import Generation, SamplingParams

logger = logging.getLogger(__name__)

_FLUSH_WAIT_S = 10.0
_NEVER = 1 << 30
"""Tokens between two interim answers: none but the first and the last are sent."""


@dataclass(kw_only=True)
class _WeightState:
    version: int = -1
    invalid: str | None = "no weights have been loaded; call update_weights first"
    """Why generation would be wrong now."""
    delivered: Mapping[str, Any] | None = None
    """The control message whose layout every engine rank holds a plan of."""
    layout: str = ""
    released: set[str] = field(default_factory=set)
    graphs_wait: bool = False
    """CUDA graphs are to be captured once everything is resident."""


class SGLangEngine:
    """Implements `mrl.interfaces.RolloutEngine` with SGLang's in-process `Engine`.

    All calls must come from the thread that started it, outside a running event loop.
    """

    def __init__(self, supervisor: EngineSupervisor, *, tp_size: int, device: str, seed: int) -> None:
        self._supervisor = supervisor
        self._tp_size = tp_size
        self._device = device
        self._seed = seed
        self._max_tokens = 0
        self._weights = _WeightState()
        self._owner_pid = os.getpid()

    @classmethod
    def start(
        cls,
        settings: EngineSettings,
        *,
        start_timeout_s: float = 600.0,
        call_timeout_s: float = 1800.0,
        log_path: Path | None = None,
        during_start: Callable[[], None] | None = None,
        part: EnginePart | None = None,
    ) -> SGLangEngine:
        """Start an engine with dummy weights; they come by `update_weights`.

        On CPU its processes are forked: start before this process has threads (torch.distributed's, for example), with
        `preload_sglang` done.

        Args:
            log_path: takes the children's output; None keeps it in a temporary file for error messages.
            during_start: runs in this process while the children load.
            part: the engine's first, where it spans hosts; names the job's store, over which its processes meet.

        Raises:
            ValueError: arguments SGLang would accept and then go wrong with.
            EngineError: the engine did not start; the message carries its children's last error lines.
        """
        supervisor = EngineSupervisor(
            settings.engine_args(part),
            forks=settings.device == "cpu",
            part=part,
            environment=settings.environment(),
            start_timeout_s=start_timeout_s,
            call_timeout_s=call_timeout_s,
            log_path=log_path,
        )
        engine = cls(supervisor, tp_size=settings.tp_size, device=settings.device, seed=settings.seed)
        atexit.register(engine.shutdown)
        try:
            engine._start(during_start)
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def restart(self) -> None:
        """Replace the engine's processes, dead or alive, by new ones with dummy weights and all of their memory.

        Raises:
            EngineError: they did not start; the engine can be restarted again.
        """
        self._supervisor.stop()
        self._start(None)

    @property
    def tp_size(self) -> int:
        """Ranks that it lives on, its owner's first."""
        return self._tp_size

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One response to each prompt, in order. The stop token, if any, is part of the response.

        Log-probs are natural logs of softmax(logits / temperature) before top-p and top-k; at temperature 0 (greedy)
        of softmax(logits).

        Raises:
            ValueError: sampling parameters or prompts the engine would not honour.
            EngineError: no valid weights.
            EngineDiedError: the engine died, or the call took longer than its deadline.
        """
        self._require_valid_weights()
        check_prompts(prompts, max_new_tokens=params.max_new_tokens, max_tokens=self._max_tokens)
        if not prompts:
            return []
        outputs: dict[int, dict[str, Any]] = {}
        work = self._answer_all([list(prompt) for prompt in prompts], params, outputs)
        generations = self._generate(work, params, outputs)
        return [generations[index] for index in range(len(prompts))]

    def generate_from(self, take: TakePrompts, params: SamplingParams, *, window: int) -> dict[int, Generation]:
        """Responses to prompts taken from a queue, at most `window` at a time, by their index.

        A slot that becomes free takes the next prompt at once. Raises as `generate` does.
        """
        self._require_valid_weights()
        outputs: dict[int, dict[str, Any]] = {}
        work = self._drain(take, params, outputs, window=window)
        return self._generate(work, params, outputs)

    def update_weights(self, control: Mapping[str, Any], *, weight_version: int, redo: int = 0) -> WeightUpdateReport:
        """Have every engine rank pull its weights from the sources that `control` (`spec`, `sources`) names.

        Pass the same object again while the sources stay: only the first call then carries them. The random stream of
        sampling restarts from the engine's seed, the version and `redo`.

        Raises:
            EngineError: with every failing rank's own message. The engine takes further calls, but does not generate
                until an update succeeds.
        """
        state, begin = self._weights, time.perf_counter()
        message: dict[str, Any] = {
            "action": "pull",
            "seed": self._sampling_seed(weight_version, redo),
            "round": update_round(weight_version, redo),
        }
        if control is not state.delivered:
            state.layout = hashlib.sha256(json.dumps(control, sort_keys=True).encode()).hexdigest()[:16]
            message |= control
        state.delivered, state.invalid = None, "the last weight update failed; repeat it"
        statuses = self._control(message | {"layout": state.layout}, weight_version)
        check_own_pairs(statuses)
        state.delivered, state.invalid, state.version = control, None, weight_version
        state.graphs_wait = any(status["graphs_wait"] for status in statuses)
        self._capture_graphs()
        return report_of(statuses, weight_version=weight_version, call_s=time.perf_counter() - begin)

    def refuse_weights(self, reason: str) -> None:
        """Generate no more until an update succeeds, which plans anew."""
        self._weights.delivered, self._weights.invalid = None, reason

    def poison_weights(self) -> None:
        """Fill the engine's own parameters with NaN, so that a test sees what an update missed."""
        self._weights.invalid = "the weights were poisoned; call update_weights"
        self._control({"action": "poison"}, None)

    def fingerprint_weights(self) -> list[dict[str, str]]:
        """SHA-256 of every parameter's bytes by SGLang's name, for each engine rank."""
        return [status["parameters"] for status in self._control({"action": "fingerprint"}, None)]

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give the GPU memory of `tags` ("weights", "kv_cache", "cuda_graph") back; released weights are lost.

        On CPU only the KV cache's contents are dropped: SGLang's memory saver maps CUDA memory and nothing else.
        A dead engine has nothing to give.
        """
        if self._supervisor.is_dead:
            return
        self._flush()
        wanted = [tag for tag in tags if tag not in self._weights.released]
        if self._device == "cpu" or not wanted:
            return
        request = ReleaseMemoryOccupationReqInput(tags=wanted)
        self._call(self._supervisor.manager.release_memory_occupation(request, None), "release_memory")
        self._weights.released |= set(wanted)
        if "weights" in wanted:
            self._weights.invalid = "the weights' memory was released; call resume_memory and update_weights"

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory of `tags` again. Weights then hold garbage until `update_weights`.

        CUDA graphs that waited for the weights' addresses are captured with the last tag. A dead engine takes nothing
        before it is restarted.
        """
        wanted = [tag for tag in tags if tag in self._weights.released]
        if not wanted or self._supervisor.is_dead:
            return
        request = ResumeMemoryOccupationReqInput(tags=wanted)
        self._call(self._supervisor.manager.resume_memory_occupation(request, None), "resume_memory")
        self._weights.released -= set(wanted)
        self._capture_graphs()

    def shutdown(self) -> None:
        """Kill and reap the engine's processes; idempotent. Other children of this process are left alone."""
        if os.getpid() != self._owner_pid:
            return
        atexit.unregister(self.shutdown)
        self._supervisor.close()

    def _start(self, during_start: Callable[[], None] | None) -> None:
        self._weights = _WeightState()
        self._max_tokens = max_request_tokens(self._supervisor.start(during_start))

    def _generate(
        self, work: Coroutine[Any, Any, None], params: SamplingParams, outputs: Mapping[int, dict[str, Any]]
    ) -> dict[int, Generation]:
        """What `work` puts into `outputs` as it comes; what is there when the engine dies goes with the error."""
        try:
            self._supervisor.call(work, "generate", progress=lambda: f"{len(outputs)} responses are complete")
        except EngineDiedError as error:
            error.finished = _generations_of(outputs, params)
            raise
        return _generations_of(outputs, params)

    async def _answer_all(
        self, prompts: list[list[int]], params: SamplingParams, outputs: dict[int, dict[str, Any]]
    ) -> None:
        """All prompts in one message; answers are there as soon as they are complete."""
        request = GenerateReqInput(
            input_ids=prompts,
            sampling_params={**sampling_dict(params), "stream_interval": _NEVER},
            return_logprob=True,
            return_routed_experts=params.return_routed_experts,
            stream=True,
        )
        async for output in self._supervisor.manager.generate_request(request, None):
            if output["meta_info"]["finish_reason"] is not None:
                outputs[output["index"]] = pack_experts(output)

    async def _answer(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        request = GenerateReqInput(
            input_ids=prompt,
            sampling_params=sampling_dict(params),
            return_logprob=True,
            return_routed_experts=params.return_routed_experts,
        )
        return pack_experts(await self._supervisor.manager.generate_request(request, None).__anext__())

    async def _drain(
        self,
        take: TakePrompts,
        params: SamplingParams,
        outputs: dict[int, dict[str, Any]],
        *,
        window: int,
    ) -> None:
        running: dict[asyncio.Task[dict[str, Any]], int] = {}
        exhausted = False
        while running or not exhausted:
            free = window - len(running)
            if free and not exhausted:
                taken = take(free)
                exhausted = not taken
                check_prompts(
                    [prompt for _, prompt in taken], max_new_tokens=params.max_new_tokens, max_tokens=self._max_tokens
                )
                running |= {asyncio.ensure_future(self._answer(list(ids), params)): index for index, ids in taken}
            if running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                outputs |= {running.pop(task): task.result() for task in done}

    def _control(self, message: Mapping[str, Any], weight_version: int | None) -> list[dict[str, Any]]:
        """Send the weight loader a message; each rank's status, in rank order. The KV cache is emptied first."""
        # Not with the update: right after a generation the scheduler may still count as busy, and would fail it.
        self._flush()
        payload = MultiprocessingSerializer.serialize([(json.dumps(message), torch.empty(0))])
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[payload] * self._tp_size,
            load_format=weight_loader.PATH,
            flush_cache=False,
            weight_version=None if weight_version is None else str(weight_version),
        )
        manager = self._supervisor.manager
        ok, text = self._call(manager.update_weights_from_tensor(request, None), "update_weights")
        try:
            reports, _ = json.JSONDecoder().raw_decode(text)  # SGLang appends a sentence about the version
        except json.JSONDecodeError as error:
            raise EngineError(
                f"weight update was not reported ({ok}, {text!r}); are mrl's entry points installed?"
            ) from error
        failed = [f"engine rank {rank}: {status['error']}" for rank, (fine, status) in enumerate(reports) if not fine]
        if failed or not ok:
            details = [status.get("traceback", "") for fine, status in reports if not fine]
            raise EngineError("weight loader failed: " + "; ".join(failed) + "\n" + "\n".join(details))
        return [status for _, status in reports]

    def _capture_graphs(self) -> None:
        """Where graphs wait for what has just been done: the weights are valid and nothing is released."""
        state = self._weights
        if not state.graphs_wait or state.invalid or state.released:
            return
        begin = time.perf_counter()
        gib = self._control({"action": "capture"}, None)[0]["graph_gib"]
        state.graphs_wait = False
        if self._device == "cuda":
            logger.info("CUDA graphs captured in %.1f s, %.2f GiB", time.perf_counter() - begin, gib)

    def _flush(self) -> None:
        """Drop the KV cache once the engine is idle; SGLang's scheduler dies of some calls made before that."""
        manager = self._supervisor.manager
        if not self._call(manager.flush_cache(timeout_s=_FLUSH_WAIT_S), "flush").success:
            raise EngineError(f"engine was not idle within {_FLUSH_WAIT_S:.0f} s")

    def _call(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        return self._supervisor.call(work, what)

    def _require_valid_weights(self) -> None:
        _ = self._supervisor.manager
        if self._weights.invalid:
            raise EngineError(f"engine cannot generate: {self._weights.invalid}")

    def _sampling_seed(self, weight_version: int, redo: int) -> int:
        name = f"{self._seed}/{weight_version}" + (f"/{redo}" if redo else "")
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _generations_of(outputs: Mapping[int, dict[str, Any]], params: SamplingParams) -> dict[int, Generation]:
    return {index: generation_of(output, params) for index, output in outputs.items()}
