"""Megatron-core's process-global state, one copy per role.

Process groups are passed to megatron explicitly wherever it takes them, but it still reads module globals in places:
the random-number tracker, the groups of cross-entropy and of checkpointing, the layer offsets. A role's code runs
inside `with role_state:`. Outside of it the state is uninitialised, so that a forgotten `with` is an assertion of
megatron instead of a computation with another role's groups.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

import megatron.core.num_microbatches_calculator as microbatches
import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core import parallel_state

_active: RoleState | None = None


def _copy_of(value: Any) -> Any:
    return type(value)(value) if isinstance(value, (dict, list)) else value


_NAMES = [name for name in vars(parallel_state) if re.fullmatch(r"_[A-Z][A-Z0-9_]*", name)]
_NAMES.append("_global_process_group_list")
_UNINITIALISED = {name: _copy_of(getattr(parallel_state, name)) for name in _NAMES}

_Snapshot = tuple[dict[str, Any], tuple[Any, bool, torch.Tensor], Any]


class RoleState:
    """Context manager: inside, megatron's globals are this role's; afterwards they are as before. Does not nest."""

    def __init__(self) -> None:
        groups = {name: _copy_of(value) for name, value in _UNINITIALISED.items()}
        self._inside: _Snapshot = (groups, (None, False, device_rng_state()), None)
        self._outside: _Snapshot | None = None

    def __enter__(self) -> RoleState:
        global _active
        if _active is not None:
            raise RuntimeError("the state of a Megatron role is already active; roles do not nest")
        self._outside = _capture()
        _active = self
        _install(self._inside)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        assert self._outside is not None
        self._inside = _capture()
        _install(self._outside)
        _active, self._outside = None, None


def device_rng_state() -> torch.Tensor:
    """State of the generator that kernels of this process draw from."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def set_device_rng_state(state: torch.Tensor) -> None:
    """Continue that generator from `state`."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _capture() -> _Snapshot:
    groups = {name: getattr(parallel_state, name) for name in _NAMES}
    tracker = megatron_random._CUDA_RNG_STATE_TRACKER, megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    return groups, (*tracker, device_rng_state()), microbatches._GLOBAL_NUM_MICROBATCHES_CALCULATOR


def _install(snapshot: _Snapshot) -> None:
    groups, (tracker, initialized, rng_state), calculator = snapshot
    for name, value in groups.items():
        setattr(parallel_state, name, value)
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = initialized
    set_device_rng_state(rng_state)
    microbatches._GLOBAL_NUM_MICROBATCHES_CALCULATOR = calculator
