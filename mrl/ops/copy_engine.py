"""Strided copies by the copy engines, which read other devices' memory faster than kernels do (docs/csrc.md)."""

from __future__ import annotations

from torch import Tensor

from mrl.ops.extension import backend


def copy_engine_copy_(anchor: Tensor, descriptors: Tensor) -> None:
    """Put one copy for each operation into the current stream of `anchor.device`, in order (on CPU: copy).

    A copy costs about 9 us beside its bytes, little less on several streams: small ones are the kernel's. Addresses are
    trusted, as in `mrl.ops.tiles`.

    Args:
        anchor: any tensor on the device that holds the destinations; see `batched_strided_copy_`.
        descriptors: [num_ops, 6] int64 on CPU, as of `build_tiles`, without fills; read before this returns.

    Raises:
        RuntimeError: shape, dtype or device is not as above, an operation is no strided copy, or the driver refuses.
    """
    backend().copy_engine_copy_(anchor, descriptors)
