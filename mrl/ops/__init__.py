"""Operations on raw memory: strided copies in one launch or by the copy engines, their checksum, and CUDA IPC.

The work is done by the compiled extension of csrc/ (`mrl.ops.extension` says where it comes from), or by the slower
`mrl.ops.reference` where none can be had. Beside them, `mrl.ops.vocab_statistics` has kernels of its own, in Triton.
"""

from mrl.ops.copy_engine import copy_engine_copy_
from mrl.ops.cuda_ipc import ipc_close, ipc_export, ipc_open, tensor_from_ptr
from mrl.ops.tiles import batched_strided_copy_, batched_strided_copy_checksum_, build_tiles, checksum

__all__ = [
    "batched_strided_copy_",
    "batched_strided_copy_checksum_",
    "build_tiles",
    "checksum",
    "copy_engine_copy_",
    "ipc_close",
    "ipc_export",
    "ipc_open",
    "tensor_from_ptr",
]
