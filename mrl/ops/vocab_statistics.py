"""Statistics of vocabulary columns and the gradient through them: Triton kernels on GPUs, torch elsewhere.

`mrl.ops.vocab_fused` and `mrl.ops.vocab_reference` have the same two functions, `statistics` and `gradient`; what they
compute is described in the latter. `implementation` alone decides between them.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor

from mrl.ops import vocab_reference

logger = logging.getLogger(__name__)

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def implementation(logits: Tensor) -> Any:
    """The module that works on these logits.

    The fused kernels take CUDA tensors of 16 or 32 bits whose rows are contiguous; under TRITON_INTERPRET=1, which has
    Triton run on the CPU, they take such tensors of the CPU too. All others go to the torch reference, and so do all
    of CUDA where Triton is missing, with one warning.
    """
    runs_kernels = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs_kernels or logits.dtype not in _FUSED_DTYPES or logits.stride(-1) != 1:
        return vocab_reference
    return _fused() or vocab_reference


@functools.cache
def _fused() -> Any | None:
    try:
        # Not at file top: Triton takes a second to import, and exists on few platforms without CUDA.
        return importlib.import_module("mrl.ops.vocab_fused")
    except ImportError as error:
        logger.warning(
            "log-probs and entropy run as separate torch operations, which read the logits many times: Triton cannot "
            "be imported (%s). Install the triton that this torch comes with",
            error,
        )
        return None
