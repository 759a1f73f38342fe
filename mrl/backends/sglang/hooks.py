"""Entry point of the group `sglang.srt.plugins`: hooks into SGLang's scheduler processes.

A weight loader that raises would kill its scheduler, and with it the trainer. The hooks turn that into an answer:
`(False, report)` from every tensor-parallel rank, where `report` is a JSON list with one `[ok, status]` per rank.

Where parameters are the trainer's memory, graphs are captured later than SGLang does, and nothing else may write them.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mrl.backends.sglang import aliasing, graphs, status, weight_loader

GROUP_INIT = "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__"
ROUTING_CAPTURE = "sglang.srt.model_executor.model_runner.ModelRunner.init_routed_experts_capturer"
CAPTURE_OUTPUT = "sglang.srt.state_capturer.base.BaseTopkCapturer.on_forward_end"
ROUTING_CACHE = "sglang.srt.state_capturer.base.BaseHostCache.__init__"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
LOADER = f"{_UPDATER}.update_weights_from_tensor"
OTHER_LOADERS = [f"{_UPDATER}.update_weights_from_{source}" for source in ("disk", "distributed", "ipc")]
CHECKER = "sglang.srt.model_executor.model_runner.ModelRunner.check_weights"
_GRAPHS = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
PREFILL_GRAPH, DECODE_GRAPH = f"{_GRAPHS}.capture_prefill_graph", f"{_GRAPHS}.capture_decode_graph"
PREFILL_MEMORY = f"{_GRAPHS}.should_skip_auto_prefill_cuda_graph_for_memory"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATE = f"{_MANAGER}.update_weights_from_tensor"
MEMORY = [f"{_MANAGER}.{change}_memory_occupation" for change in ("release", "resume")]

_REFUSAL = (
    "parameters of this engine are the trainer's memory, which only the trainer may write; "
    "set actor_rollout_ref.rollout.alias_weights=False"
)


def register() -> None:
    """Register the hooks; SGLang applies them in every process it starts."""
    # Imported here: entry points are resolved while sglang itself is being imported.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        HookRegistry.register(GROUP_INIT, without_cuda_collectives, HookType.AROUND)
        HookRegistry.register(ROUTING_CACHE, without_pinned_memory, HookType.AROUND)
    HookRegistry.register(ROUTING_CAPTURE, capture_every_layer, HookType.AROUND)
    HookRegistry.register(CAPTURE_OUTPUT, keep_what_was_captured, HookType.AROUND)
    HookRegistry.register(LOADER, report_every_rank, HookType.AROUND)
    HookRegistry.register(UPDATE, fail_instead_of_assert, HookType.AROUND)
    for target in MEMORY:
        HookRegistry.register(target, answer_when_all_ranks_are_done, HookType.AROUND)
    for target in OTHER_LOADERS:
        HookRegistry.register(target, refuse_trainers_memory, HookType.AROUND)
    HookRegistry.register(CHECKER, refuse_reset, HookType.AROUND)
    HookRegistry.register(PREFILL_GRAPH, put_off_prefill_graph, HookType.AROUND)
    HookRegistry.register(DECODE_GRAPH, put_off_decode_graph, HookType.AROUND)
    HookRegistry.register(PREFILL_MEMORY, skip_together, HookType.AROUND)


def without_cuda_collectives(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Build a process group without pynccl and custom all-reduce, which need CUDA."""
    for name in ("use_pynccl", "use_custom_allreduce"):
        if name in kwargs:
            kwargs[name] = False
    original(*args, **kwargs)


def capture_every_layer(original: Callable[..., None], model_runner: Any) -> None:
    """Prepare to note the experts of every token, also in models that do not tell their routers which layer it is."""
    blocks = model_runner.model.modules() if model_runner.server_args.enable_return_routed_experts else ()
    for block in blocks:
        router = getattr(block, "topk", None)
        if isinstance(router, torch.nn.Module) and router.layer_id is None:
            router.layer_id = block.experts.layer_id
    original(model_runner)


def keep_what_was_captured(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Take the experts out of the buffer that the next batch is captured into.

    SGLang 0.5.16 copies them to the host on another stream, for which the next batch does not wait.
    """
    output = original(*args, **kwargs)
    if output is not None:
        output.topk, output.out_cache_loc = output.topk.clone(), output.out_cache_loc.clone()
    return output


def without_pinned_memory(
    original: Callable[..., None], cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str
) -> None:
    """Build the cache of each token's experts in memory that needs no CUDA."""
    cache.num_tokens, cache.num_layers, cache.topk_size, cache.name = num_tokens, num_layers, topk_size, name
    cache.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)


def report_every_rank(original: Callable[..., tuple[bool, str]], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Run the loader, then gather every rank's outcome. Called by all of the engine's tp_group."""
    from sglang.srt.distributed import get_tp_group

    status.take()
    try:
        ok, message = _load(original, *args, **kwargs)
        mine = [ok, status.take() if ok else {"error": message}]
    except Exception as error:
        mine = [False, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}]
    group = get_tp_group().cpu_group
    reports: list[Any] = [mine] * dist.get_world_size(group)
    if len(reports) > 1:
        dist.all_gather_object(reports, mine, group=group)
    return all(ok for ok, _ in reports), json.dumps(reports)


def _load(original: Callable[..., tuple[bool, str]], updater: Any, *, load_format: Any, **kwargs: Any) -> Any:
    if load_format != weight_loader.PATH:
        return refuse_trainers_memory(original, updater, load_format=load_format, **kwargs)
    return original(updater, load_format=load_format, **kwargs)


def answer_when_all_ranks_are_done(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Change what the engine holds; its first rank answers when all have done so, each on a device of its own."""
    output = original(manager, *args, **kwargs)
    torch.get_device_module().synchronize()
    dist.barrier(manager.tp_cpu_group)
    return output


def refuse_trainers_memory(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load weights unless parameters are the trainer's memory."""
    if aliasing.bound():
        return False, _REFUSAL
    return original(*args, **kwargs)


def refuse_reset(original: Callable[..., Any], model_runner: Any, action: str, **kwargs: Any) -> Any:
    """Check weights, but overwrite none that are the trainer's memory; SGLang reports a ValueError to the caller."""
    if action == "reset_tensors" and aliasing.bound():
        raise ValueError(_REFUSAL)
    return original(model_runner, action=action, **kwargs)


def put_off_prefill_graph(original: Callable[..., Any], *, model_runner: Any, eager_runner: Any, **kwargs: Any) -> Any:
    """Capture prefill's graphs, or leave its batches to the runner without graphs until the parameters are in place."""
    if graphs.put_off(model_runner):
        return eager_runner
    return original(model_runner=model_runner, eager_runner=eager_runner, **kwargs)


def put_off_decode_graph(original: Callable[..., Any], *, model_runner: Any) -> Any:
    """Capture decoding's graphs, or none until the parameters are in place."""
    from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import DecodeGraphCapture

    if graphs.put_off(model_runner):
        return DecodeGraphCapture(runner=None, graph_mem_usage=0)
    return original(model_runner=model_runner)


def skip_together(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Skip prefill's graphs for lack of memory where any rank of the engine has to."""
    return graphs.any_rank_skips(original(*args, **kwargs))


def fail_instead_of_assert(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Answer with a failure where the scheduler's own check (a flush of a busy engine) would kill it."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    try:
        return original(manager, request)
    except AssertionError as error:
        # The check sits between the load and this barrier; ranks that passed it are waiting there.
        dist.barrier(group=manager.tp_cpu_group)
        report = {"error": f"AssertionError: {error}", "traceback": traceback.format_exc()}
        return UpdateWeightsFromTensorReqOutput(success=False, message=json.dumps([[False, report]]))
