"""Entry point of the group `sglang.srt.plugins`: hooks into SGLang's scheduler processes.

A weight loader that raises would kill its scheduler, and with it the trainer. The hooks turn that into an answer:
`(False, report)` from every tensor-parallel rank, where `report` is a JSON list with one `[ok, status]` per rank.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mrl.backends.sglang import status

GROUP_INIT = "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__"
LOADER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"
UPDATE = (
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_tensor"
)


def register() -> None:
    """Register the hooks; SGLang applies them in every process it starts."""
    # Imported here: entry points are resolved while sglang itself is being imported.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        HookRegistry.register(GROUP_INIT, without_cuda_collectives, HookType.AROUND)
    HookRegistry.register(LOADER, report_every_rank, HookType.AROUND)
    HookRegistry.register(UPDATE, fail_instead_of_assert, HookType.AROUND)


def without_cuda_collectives(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Build a process group without pynccl and custom all-reduce, which need CUDA."""
    for name in ("use_pynccl", "use_custom_allreduce"):
        if name in kwargs:
            kwargs[name] = False
    original(*args, **kwargs)


def report_every_rank(original: Callable[..., tuple[bool, str]], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Run the loader, then gather every rank's outcome. Called by all of the engine's tp_group."""
    from sglang.srt.distributed import get_tp_group

    status.take()
    try:
        ok, message = original(*args, **kwargs)
        mine = [ok, status.take() if ok else {"error": message}]
    except Exception as error:
        mine = [False, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}]
    group = get_tp_group().cpu_group
    reports: list[Any] = [mine] * dist.get_world_size(group)
    if len(reports) > 1:
        dist.all_gather_object(reports, mine, group=group)
    return all(ok for ok, _ in reports), json.dumps(reports)


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
