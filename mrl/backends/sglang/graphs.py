"""CUDA graphs of an engine whose parameters become the trainer's memory: captured after that, not at its start.

A graph holds the addresses that its kernels had when it was captured. While it waits for them the engine runs without
graphs, as it does where they are disabled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mrl.backends.sglang import aliasing


@dataclass
class _Capture:
    """What was put off in this process."""

    model_runner: Any = None
    is_waiting: bool = False
    is_running: bool = False


_state = _Capture()


def put_off(model_runner: Any) -> bool:
    """Whether this capture, which SGLang makes at its start, is to wait; it is remembered then."""
    if not aliasing.is_on() or _state.is_running:
        return False
    _state.model_runner, _state.is_waiting = model_runner, True
    return True


def check_put_off() -> None:
    """Raise RuntimeError if SGLang has captured graphs at its start: they would go on reading what parameters were."""
    if _state.model_runner is None:
        raise RuntimeError(
            "this SGLang captures CUDA graphs in another place than the hooks know, so weights cannot be aliased; set "
            "actor_rollout_ref.rollout.alias_weights=False"
        )


def is_waiting() -> bool:
    """Whether graphs are missing, or were captured before parameters moved."""
    return _state.is_waiting


def invalidate() -> None:
    """Parameters have moved: what was captured reads the wrong memory."""
    _state.is_waiting = True


def capture() -> float:
    """Capture all graphs, in SGLang's order; returns the memory that decoding's graphs took, in GiB.

    Called by all of tp_group. The engine is idle, its weights valid and its KV cache resident.
    """
    runner = _state.model_runner
    _state.is_running = True
    try:
        # As at the engine's start: tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            runner.init_prefill_cuda_graph()
            runner.init_decode_cuda_graph()
    finally:
        _state.is_running = False
    _state.is_waiting = False
    return float(runner.graph_mem_usage)


def any_rank_skips(skip: bool) -> bool:
    """Whether any rank of the engine skips a capture for lack of memory. Called by all of tp_group.

    At the engine's start all have as much; beside a trainer they may not, and one alone would capture collectives.
    """
    from sglang.srt.distributed import get_tp_group

    if not _state.is_running:
        return skip
    answer = torch.tensor(skip, dtype=torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
    return bool(answer)
