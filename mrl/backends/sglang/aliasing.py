"""Engine parameters that are the trainer's memory: which they are now, and where their own memory went.

On by an environment variable of the engine's processes, since it decides at their start when graphs are captured.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mrl.reshard.plan import Plan

VARIABLE = "MRL_ALIAS_WEIGHTS"
_WEIGHTS = "weights"
"""SGLang's tag of their memory."""

_names: set[str] = set()


def environment(alias_weights: bool) -> dict[str, str]:
    """Variables for the processes of an engine."""
    return {VARIABLE: "1" if alias_weights else "0"}


def is_on() -> bool:
    """Whether this engine process is to alias what it can."""
    return os.environ.get(VARIABLE) == "1"


def bound() -> frozenset[str]:
    """Names of the parameters that are the trainer's memory now. Nothing may write them, or unmap what they lie in."""
    return frozenset(_names)


@contextmanager
def rebinding(plan: Plan, params: Mapping[str, Tensor], on_move: Callable[[], None]) -> Iterator[None]:
    """Around the binding of a plan's aliases: returns the memory that parameters had of their own.

    Args:
        on_move: called when a parameter has another address than before.

    Raises:
        ValueError: a parameter that is the trainer's memory would need memory of its own again.
    """
    names = {alias.dst_param for alias in plan.aliases}
    if lost := sorted(_names - names):
        raise ValueError(
            f"parameters {', '.join(lost[:3])} are the trainer's memory and have none of their own for the new layout "
            "of the trainer's weights; restart the engine"
        )
    before = {name: params[name].data_ptr() for name in names}
    _names.update(names)
    try:
        # A parameter cannot be a tensor that was made in inference mode.
        with torch.inference_mode(False):
            yield
    finally:
        if any(params[name].data_ptr() != before[name] for name in names):
            on_move()
            _give_back()


def _give_back() -> None:
    """Return to the system the memory that no parameter lies in any more."""
    gc.collect()
    if not torch.cuda.is_initialized():
        ctypes.CDLL(None).malloc_trim(0)
        return
    torch.cuda.synchronize()
    _dissolve_pool()


def _dissolve_pool() -> None:
    """Let go of the allocator's pool that the weights were loaded into: while it exists it keeps what is freed in it.

    What still lies in it stays, and is released and resumed with its tag as before.
    """
    # Imported here: only where SGLang runs on CUDA.
    from torch_memory_saver import torch_memory_saver  # type: ignore[import-untyped]

    saver = torch_memory_saver._impl
    if saver is None:
        # The engine runs without the memory saver.
        torch.cuda.empty_cache()
        return
    # Outside of a region its allocator ends the process that frees: seen with 0.0.10.
    with saver._with_region_config(tag=_WEIGHTS, enable_cpu_backup=False, cpu_backup_backend=None):
        for key in [key for key in saver._mem_pools if key[0] == _WEIGHTS]:
            del saver._mem_pools[key]
        torch.cuda.empty_cache()
