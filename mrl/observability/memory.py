"""Memory of this process and its device."""

from __future__ import annotations

import resource

import torch

GIB = 2**30


def peak_memory_gib() -> float:
    """Peak device memory allocated by torch with a GPU, else the peak resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def device_memory_in_use_gib() -> float:
    """Memory of the current device that is in use by any process; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB
