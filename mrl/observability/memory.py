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


class CudaMemory:
    """The memory of the current device, of which this process and a rollout engine's have parts.

    Built before this process keeps anything there: what is in use then, beside torch's tensors, is for good.
    """

    def __init__(self) -> None:
        self._residue_at_start = self._residue()

    def in_use(self) -> int:
        """Bytes in use by anybody."""
        free, total = torch.cuda.mem_get_info()
        return total - free

    def free(self) -> int:
        """Bytes that anybody may take."""
        return torch.cuda.mem_get_info()[0]

    def reclaim(self) -> None:
        """Wait for this process's work and copies, and give what torch holds unused back to the device."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def metrics(self, moment: str) -> dict[str, float]:
        """`memory/<moment>_gib`, in use by anybody; `..._allocated_gib`, by tensors here; `..._reserved_gib`, by torch.

        The last two are of this process.
        """
        return {
            f"memory/{moment}_gib": self.in_use() / GIB,
            f"memory/{moment}_allocated_gib": torch.cuda.memory_allocated() / GIB,
            f"memory/{moment}_reserved_gib": torch.cuda.memory_reserved() / GIB,
        }

    def residue_metrics(self) -> dict[str, float]:
        """Memory in use that is not torch's here, while the engine has given back what it can.

        `memory/residue_at_start_gib` of it was there before any role: CUDA contexts of all processes, the engine's
        graphs and workspaces. The rest came since: communicators, loaded kernels, workspaces. `memory/host_pinned_gib`
        is what this process has pinned of the host's memory.
        """
        return {
            "memory/residue_gib": self._residue() / GIB,
            "memory/residue_at_start_gib": self._residue_at_start / GIB,
            "memory/host_pinned_gib": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB,
        }

    def _residue(self) -> int:
        return self.in_use() - torch.cuda.memory_reserved()
