"""Result shapes of the compiled ops, for torch.compile and export."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
from torch import Tensor

TILE_FIELDS = 8


@functools.cache
def register() -> None:
    """Register them, once, after the extension is loaded."""
    torch.library.register_fake("mrl::build_tiles", _build_tiles)
    torch.library.register_fake("mrl::batched_strided_copy_", lambda anchor, tiles: None)
    torch.library.register_fake("mrl::batched_strided_copy_checksum_", lambda anchor, tiles: tiles.new_empty([1]))
    torch.library.register_fake("mrl::checksum", lambda tiles, of_source: tiles.new_empty([1]))
    torch.library.register_fake("mrl::copy_engine_copy_", lambda anchor, descriptors: None)
    torch.library.register_fake("mrl::tensor_from_ptr", _tensor_from_ptr)
    for name in ("ipc_export", "ipc_open", "ipc_close"):
        torch.library.register_fake(f"mrl::{name}", _refuse)


def _build_tiles(descriptors: Tensor, tile_bytes: int, sources: Tensor | None = None) -> Tensor:
    return descriptors.new_empty([torch.library.get_ctx().new_dynamic_size(), TILE_FIELDS])


def _tensor_from_ptr(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty([num_bytes], dtype=torch.uint8, device=device)


def _refuse(*args: object) -> NoReturn:
    raise NotImplementedError("CUDA IPC handles and addresses belong to a process; open them outside of traced code")
