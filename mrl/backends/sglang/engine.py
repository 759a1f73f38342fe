"""A SGLang engine owned by one trainer process: token ids in, token ids and log-probs out."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    FreezeGCReq,
    GenerateReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.utils import MultiprocessingSerializer

from mrl.backends.sglang import weight_loader
from mrl.backends.sglang.arguments import (
    UNUSABLE_TOKENS,
    check_start,
    child_environment,
    max_request_tokens,
    server_args,
)
from mrl.backends.sglang.launch import StartedEngine, close_sockets, context_for, start_engine
from mrl.backends.sglang.requests import check_prompts, generation_of, sampling_dict
from mrl.interfaces import EngineError, WeightUpdateReport
from mrl.types import Generation, SamplingParams

TakePrompts = Callable[[int], Sequence[tuple[int, Sequence[int]]]]
"""Called with the number of free slots; returns at most that many (index, token ids), none when the queue is empty."""

_POLL_S = 0.2
_FLUSH_WAIT_S = 10.0


@dataclass(kw_only=True)
class _WeightState:
    version: int = -1
    invalid: str | None = "no weights have been loaded; call update_weights first"
    """Why generation would be wrong now."""
    delivered: Mapping[str, Any] | None = None
    """The control message whose layout every engine rank holds a plan of."""
    layout: str = ""
    released: set[str] = field(default_factory=set)


class SGLangEngine:
    """Implements `mrl.interfaces.RolloutEngine` with SGLang's in-process `Engine`.

    All calls must come from the thread that started it, outside a running event loop.
    """

    def __init__(self, started: StartedEngine, *, tp_size: int, device: str, seed: int, call_timeout_s: float) -> None:
        self._engine: Any = started.engine
        self._children = started.children
        self._tp_size = tp_size
        self._device = device
        self._seed = seed
        self._call_timeout_s = call_timeout_s
        self._max_tokens = max_request_tokens(started.scheduler_info)
        self._failure: str | None = None
        self._weights = _WeightState()
        self._owner_pid = os.getpid()
        self._previous_quit = started.previous_quit

    @classmethod
    def start(
        cls,
        model_path: str | Path,
        *,
        tp_size: int,
        dtype: str,
        device: str,
        context_length: int,
        max_running_requests: int = 256,
        max_total_tokens: int | None = None,
        mem_fraction_static: float | None = None,
        seed: int = 0,
        start_timeout_s: float = 600.0,
        call_timeout_s: float = 1800.0,
        log_path: Path | None = None,
        during_start: Callable[[], None] | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> SGLangEngine:
        """Start an engine of `tp_size` processes with dummy weights; they come by `update_weights`.

        On CPU the processes are forked: start before torch.distributed is initialised, from a parent that called
        `preload_sglang`.

        Args:
            dtype: torch's name, "float32" or "bfloat16".
            device: "cpu" or "cuda".
            context_length: most tokens of a prompt and its response together.
            max_total_tokens: KV cache slots; None lets SGLang fill `mem_fraction_static` of the memory (CUDA only).
            log_path: takes the children's output; None keeps it in a temporary file for error messages.
            during_start: runs in this process while the children load.
            engine_kwargs: further arguments of SGLang's `Engine`, which win over the ones made here.

        Raises:
            ValueError: arguments SGLang would accept and then go wrong with.
            EngineError: the engine did not start; the message carries its children's last error lines.
        """
        check_start(
            Path(model_path),
            tp_size=tp_size,
            device=device,
            context_length=context_length,
            max_total_tokens=max_total_tokens,
        )
        args = server_args(
            device,
            model_path=str(model_path),
            tp_size=tp_size,
            dtype=dtype,
            context_length=context_length + UNUSABLE_TOKENS,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
            random_seed=seed,
            **({} if mem_fraction_static is None else {"mem_fraction_static": mem_fraction_static}),
            **(engine_kwargs or {}),
        )
        started = start_engine(
            args,
            context=context_for(device),
            environment=child_environment(device, tp_size),
            timeout_s=start_timeout_s,
            log_path=log_path,
            during_start=during_start,
        )
        engine = cls(started, tp_size=tp_size, device=device, seed=seed, call_timeout_s=call_timeout_s)
        atexit.register(engine.shutdown)
        engine._take_over(time.monotonic() + start_timeout_s)
        return engine

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """One response to each prompt, in order. The stop token, if any, is part of the response.

        Log-probs are natural logs of softmax(logits / temperature) before top-p and top-k; at temperature 0 (greedy)
        of softmax(logits).

        Raises:
            ValueError: sampling parameters or prompts the engine would not honour.
            EngineError: no valid weights, the engine died, or the call took longer than its deadline.
        """
        self._require_valid_weights()
        check_prompts(prompts, max_new_tokens=params.max_new_tokens, max_tokens=self._max_tokens)
        sampling = sampling_dict(params)
        if not prompts:
            return []
        outputs = self._call(self._submit([list(prompt) for prompt in prompts], sampling), "generate")
        return [generation_of(output, max_new_tokens=params.max_new_tokens) for output in outputs]

    def generate_from(self, take: TakePrompts, params: SamplingParams, *, window: int) -> dict[int, Generation]:
        """Responses to prompts taken from a queue, at most `window` at a time, by their index.

        A slot that becomes free takes the next prompt at once. Raises as `generate` does.
        """
        self._require_valid_weights()
        sampling = sampling_dict(params)
        outputs = self._call(self._drain(take, sampling, params.max_new_tokens, window), "generate")
        return {index: generation_of(output, max_new_tokens=params.max_new_tokens) for index, output in outputs.items()}

    def update_weights(self, control: Mapping[str, Any], *, weight_version: int) -> WeightUpdateReport:
        """Have every engine rank pull its weights from the sources that `control` (`spec`, `sources`) names.

        Pass the same object again while the sources stay: only the first call then carries them.

        Raises:
            EngineError: with every failing rank's own message. The engine takes further calls, but does not generate
                until an update succeeds.
        """
        state, begin = self._weights, time.perf_counter()
        message: dict[str, Any] = {"action": "pull", "seed": self._sampling_seed(weight_version)}
        if control is not state.delivered:
            state.layout = hashlib.sha256(json.dumps(control, sort_keys=True).encode()).hexdigest()[:16]
            message |= control
        state.delivered, state.invalid = None, "the last weight update failed; repeat it"
        statuses = self._control(message | {"layout": state.layout}, weight_version)
        state.delivered, state.invalid, state.version = control, None, weight_version
        return WeightUpdateReport(
            weight_version=weight_version,
            bytes=sum(status["bytes"] for status in statuses),
            ops=sum(status["ops"] for status in statuses),
            pull_s=max(status["seconds"] for status in statuses),
            call_s=time.perf_counter() - begin,
        )

    def poison_weights(self) -> None:
        """Fill every engine parameter with NaN, so that a test sees what an update missed."""
        self._weights.invalid = "the weights were poisoned; call update_weights"
        self._control({"action": "poison"}, None)

    def fingerprint_weights(self) -> list[dict[str, str]]:
        """SHA-256 of every parameter's bytes by SGLang's name, for each engine rank."""
        return [status["parameters"] for status in self._control({"action": "fingerprint"}, None)]

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give the GPU memory of `tags` ("weights", "kv_cache", "cuda_graph") back; released weights are lost.

        On CPU only the KV cache's contents are dropped: SGLang's memory saver maps CUDA memory and nothing else.
        """
        self._flush()
        wanted = [tag for tag in tags if tag not in self._weights.released]
        if self._device == "cpu" or not wanted:
            return
        manager = self._engine.tokenizer_manager
        self._call(
            manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=wanted), None), "release_memory"
        )
        self._weights.released |= set(wanted)
        if "weights" in wanted:
            self._weights.invalid = "the weights' memory was released; call resume_memory and update_weights"

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory of `tags` again. Weights then hold garbage until `update_weights`."""
        wanted = [tag for tag in tags if tag in self._weights.released]
        if not wanted:
            return
        manager = self._engine.tokenizer_manager
        self._call(manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=wanted), None), "resume_memory")
        self._weights.released -= set(wanted)

    def shutdown(self) -> None:
        """Kill and reap the engine's processes; idempotent. Other children of this process are left alone."""
        if self._engine is None or os.getpid() != self._owner_pid:
            return
        engine, self._engine = self._engine, None
        self._failure = "it was shut down"
        atexit.unregister(self.shutdown)
        self._children.stop()
        _close_loop(engine)
        signal.signal(signal.SIGQUIT, self._previous_quit)

    def _take_over(self, deadline: float) -> None:
        """First call: SGLang binds to its loop and takes SIGTERM and SIGQUIT; they are put back."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
        try:
            self._weights.invalid = None
            self._call(self._warm_up(handlers), "warm-up", deadline - time.monotonic())
        except BaseException:
            self.shutdown()
            raise
        self._weights.invalid = _WeightState().invalid
        self._children.unlink_files()

    async def _warm_up(self, handlers: Mapping[signal.Signals, Any]) -> None:
        manager = self._engine.tokenizer_manager
        manager.auto_create_handle_loop()
        for number, handler in handlers.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)
        await self._submit([[0]], sampling_dict(SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)))
        # Only in the schedulers: freezing here would keep the trainer's cycles alive for ever.
        manager._dispatch_to_scheduler(FreezeGCReq())

    async def _submit(self, prompts: list[list[int]], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
        request = GenerateReqInput(input_ids=prompts, sampling_params=dict(sampling), return_logprob=True)
        outputs = await self._engine.tokenizer_manager.generate_request(request, None).__anext__()
        return outputs

    async def _drain(
        self, take: TakePrompts, sampling: Mapping[str, Any], max_new_tokens: int, window: int
    ) -> dict[int, dict[str, Any]]:
        running: dict[asyncio.Task[list[dict[str, Any]]], int] = {}
        outputs: dict[int, dict[str, Any]] = {}
        exhausted = False
        while running or not exhausted:
            free = window - len(running)
            if free and not exhausted:
                taken = take(free)
                exhausted = not taken
                check_prompts(
                    [prompt for _, prompt in taken], max_new_tokens=max_new_tokens, max_tokens=self._max_tokens
                )
                running |= {asyncio.ensure_future(self._submit([list(ids)], sampling)): index for index, ids in taken}
            if running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                outputs |= {running.pop(task): task.result()[0] for task in done}
        return outputs

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
        manager = self._engine_or_raise().tokenizer_manager
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

    def _flush(self) -> None:
        """Drop the KV cache once the engine is idle; SGLang's scheduler dies of some calls made before that."""
        manager = self._engine_or_raise().tokenizer_manager
        if not self._call(manager.flush_cache(timeout_s=_FLUSH_WAIT_S), "flush").success:
            raise EngineError(f"engine was not idle within {_FLUSH_WAIT_S:.0f} s")

    def _call(self, work: Coroutine[Any, Any, Any], what: str, timeout_s: float | None = None) -> Any:
        try:
            engine = self._engine_or_raise()
        except EngineError:
            work.close()
            raise
        limit = self._call_timeout_s if timeout_s is None else timeout_s
        self._children.mark()
        return engine.loop.run_until_complete(self._supervise(work, what, limit))

    async def _supervise(self, work: Coroutine[Any, Any, Any], what: str, timeout_s: float) -> Any:
        task = asyncio.ensure_future(work)
        deadline = time.monotonic() + timeout_s
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                if task.done():
                    break
                if dead := self._children.dead():
                    self._failure = self._children.explain(f"engine died during {what} ({'; '.join(dead)})")
                elif time.monotonic() > deadline:
                    self._failure = self._children.explain(f"{what} took longer than {timeout_s:.0f} s")
                if self._failure:
                    raise EngineError(self._failure)
        finally:
            task.cancel()
        return task.result()

    def _engine_or_raise(self) -> Any:
        if self._failure is None and (dead := self._children.dead()):
            self._failure = self._children.explain(f"engine died ({'; '.join(dead)})")
        if self._failure is not None:
            raise EngineError(f"engine cannot be used: {self._failure}")
        return self._engine

    def _require_valid_weights(self) -> None:
        self._engine_or_raise()
        if self._weights.invalid:
            raise EngineError(f"engine cannot generate: {self._weights.invalid}")

    def _sampling_seed(self, weight_version: int) -> int:
        digest = hashlib.sha256(f"{self._seed}/{weight_version}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


def _close_loop(engine: Any) -> None:
    loop = engine.loop
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    for socket in (engine.tokenizer_manager.recv_from_detokenizer, engine.send_to_rpc):
        close_sockets(socket)
    engine.send_to_rpc = None
    loop.close()
    asyncio.set_event_loop(None)
