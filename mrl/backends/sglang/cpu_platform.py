"""SGLang on CPU with torch's own kernels. Imported by SGLang, only where `platform.activate` chose it.

SGLang imports this while it is itself being imported: what lies above its platform layer is imported on use.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum


class CpuPlatform(CpuSRTPlatform):
    """SGLang's CPU platform without `sgl_kernel`, whose wheel needs libcuda."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """The prefix of `forward_<key>` methods: plain torch."""
        return "native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
