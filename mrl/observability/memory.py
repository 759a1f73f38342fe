"""Peak memory of this process and its device."""

from __future__ import annotations

import resource

import torch

GIB = 2**30


def peak_memory_gib() -> float:
    """Peak device memory allocated by torch with a GPU, else the peak resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
