"""Entry point of the group `sglang.srt.platforms`: lets SGLang's stock wheel run on a machine without a GPU."""

from __future__ import annotations

import torch


def activate() -> str | None:
    """Class path of the platform to use, or None where CUDA is there and SGLang's own platform fits."""
    return None if torch.cuda.is_available() else "mrl.backends.sglang.cpu_platform.CpuPlatform"
