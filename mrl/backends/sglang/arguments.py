"""What SGLang is started with, and what it must not be started with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrl.backends.sglang import aliasing, weight_loader
from mrl.backends.sglang.parts import EnginePart

UNUSABLE_TOKENS = 2
"""Of its context length SGLang gives no request the last two tokens; it cuts responses short without a word."""


_ROTARY_HEAD_SIZES = (64, 128, 256, 512)


def max_request_tokens(scheduler_info: Mapping[str, Any]) -> int:
    """Most tokens of a prompt and its full response, from what a scheduler reports once its cache is allocated."""
    # The reported limit is for prompts alone: 5 tokens below the longest request, whose last one is never generated.
    return int(scheduler_info["max_req_input_len"]) + 5 - 1


@dataclass(kw_only=True, frozen=True)
class EngineSettings:
    """A rollout engine, the same on each of its hosts but for `gpus`."""

    model_path: str | Path
    tp_size: int
    dtype: str
    """torch's name, "float32" or "bfloat16"."""
    device: str
    """Either "cpu" or "cuda"."""
    context_length: int
    """Most tokens of a prompt and its response together."""
    max_running_requests: int = 256
    max_total_tokens: int | None = None
    """KV cache slots; None lets SGLang fill `mem_fraction_static` of the memory (CUDA only)."""
    mem_fraction_static: float | None = None
    alias_weights: bool = False
    """Have parameters be the trainer's memory where it holds the same bytes; the trainer then must not write its
    weights while the engine generates. CUDA graphs are captured after the first update."""
    gpus: Sequence[int] = ()
    """Of this host, counted from 0, that the ranks here run on, in their order; the first ones if empty."""
    seed: int = 0
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of SGLang's `Engine`, which win over the ones made here."""

    def engine_args(self, part: EnginePart | None = None) -> dict[str, Any]:
        """Arguments of SGLang's `Engine`.

        Raises:
            ValueError: arguments SGLang would accept and then go wrong with.
        """
        check_start(
            Path(self.model_path),
            tp_size=self.tp_size,
            dtype=self.dtype,
            device=self.device,
            context_length=self.context_length,
            max_total_tokens=self.max_total_tokens,
        )
        args: dict[str, Any] = {
            "model_path": str(self.model_path),
            "tp_size": self.tp_size,
            "dtype": self.dtype,
            "context_length": self.context_length + UNUSABLE_TOKENS,
            "max_running_requests": self.max_running_requests,
            "max_total_tokens": self.max_total_tokens,
            "random_seed": self.seed,
        }
        if self.device == "cuda":
            # By itself SGLang captures graphs of small batches only, 24 on a GPU of 24 GB, 256 on one of 141 GB; larger
            # ones would be decoded no faster than one core launches their kernels.
            args["cuda_graph_max_bs_decode"] = self.max_running_requests
        if self.mem_fraction_static is not None:
            args["mem_fraction_static"] = self.mem_fraction_static
        if self.gpus:
            args["base_gpu_id"] = 0 if _are_reordered(self.gpus) else self.gpus[0]
        if part is not None:
            args |= part.server_args()
        return server_args(self.device, **(args | dict(self.engine_kwargs)))

    def environment(self) -> dict[str, str]:
        """Variables of the engine's processes."""
        return child_environment(self.device, self.tp_size, alias_weights=self.alias_weights, gpus=self.gpus)


def server_args(device: str, **values: Any) -> dict[str, Any]:
    """Arguments of SGLang's `Engine` on a device; `values` win.

    Raises:
        ValueError: experts dealt out over ranks on CPU, where SGLang does not know of other ranks' experts.
    """
    if device == "cpu" and values.get("ep_size", 1) > 1:
        raise ValueError(
            f"engine_kwargs.sglang.ep_size = {values['ep_size']}: SGLang on CPU has no expert parallelism and dies "
            "at the first token; leave it at 1, and the experts are cut over the tensor-parallel ranks"
        )
    args: dict[str, Any] = {
        "device": device,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "custom_weight_loader": [weight_loader.PATH],
        "weight_version": "-1",
        "log_level": "error",
    }
    if device == "cpu":
        args |= {
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_overlap_schedule": True,
            "disable_cuda_graph": True,
            "mem_fraction_static": 0.5,
            # Otherwise idle schedulers spin on the cores that the trainer's ranks need.
            "sleep_on_idle": True,
        }
    else:
        args |= {"enable_memory_saver": True}
    return args | values


def _are_reordered(gpus: Sequence[int]) -> bool:
    return list(gpus) != list(range(gpus[0], gpus[0] + len(gpus)))


def child_environment(
    device: str, tp_size: int, *, alias_weights: bool = False, gpus: Sequence[int] = ()
) -> dict[str, str]:
    """Environment variables of the engine's processes; SGLang counts GPUs upwards, so another order is made here."""
    environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1", **aliasing.environment(alias_weights)}
    if device == "cuda":
        environment |= _gpu_environment()
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        bound = [str(cores[rank % len(cores)]) for rank in range(tp_size)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    if gpus and _are_reordered(gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(max(gpus) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    return environment


def _gpu_environment() -> dict[str, str]:
    # By numactl, in front of the interpreter, it would bind only where the start method is spawn for all of a process.
    environment = {"SGLANG_NUMA_BIND_V2": "0"}
    folder = _cuda_runtime_folder(Path("/proc/self/maps").read_text())
    if folder is not None:
        # The memory saver is preloaded, before Python could say where torch's CUDA runtime is.
        searched = [os.environ.get("LD_LIBRARY_PATH"), folder]
        environment["LD_LIBRARY_PATH"] = ":".join(path for path in searched if path)
    return environment


def _cuda_runtime_folder(mapped: str) -> str | None:
    """Where the CUDA runtime that torch has loaded lies, from /proc/self/maps."""
    paths = (line.split(maxsplit=5)[5] for line in mapped.splitlines() if "/libcudart.so" in line)
    return next((str(Path(path).parent) for path in paths), None)


def check_start(
    model_path: Path, *, tp_size: int, dtype: str, device: str, context_length: int, max_total_tokens: int | None
) -> None:
    """Refuse what SGLang would start with and then compute wrongly.

    Raises:
        ValueError: not a model folder, a context longer than the model's, log-probs switched to another definition;
            on CUDA also heads that SGLang has no kernel for; on CPU also KV heads that `tp_size` does not divide, no
            `max_total_tokens`, or a process that must not be forked any more.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r} must be cpu or cuda")
    path = model_path / "config.json"
    if not path.is_file():
        raise ValueError(f"{model_path} is not a Hugging Face model folder: {path} does not exist")
    config = json.loads(path.read_text())
    longest = config.get("max_position_embeddings")
    if longest is not None and context_length > longest:
        raise ValueError(f"context_length = {context_length} exceeds max_position_embeddings = {longest} of {path}")
    if os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "0").lower() in ("1", "true"):
        raise ValueError(
            "SGLANG_RETURN_ORIGINAL_LOGPROB is set: log-probs would not be at the sampling temperature; unset it"
        )
    if device != "cpu":
        _check_head_size(config, dtype, path)
        return
    if max_total_tokens is None:
        raise ValueError("max_total_tokens must be set on CPU; SGLang would take half of the machine's memory")
    kv_heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or tp_size
    if kv_heads % tp_size:
        raise ValueError(
            f"rollout tensor parallel size {tp_size} does not divide num_key_value_heads = {kv_heads} of {path}: "
            "SGLang on CPU pads heads instead of replicating them; lower it, or use a model with more KV heads"
        )
    if dist.is_available() and dist.is_initialized():
        raise ValueError("start the engine before torch.distributed: its processes are forked and would inherit it")


def _check_head_size(config: Mapping[str, Any], dtype: str, path: Path) -> None:
    # Of the supported families this one alone writes its KV cache in the rotary kernel, in bfloat16.
    if config.get("model_type") != "qwen3_moe" or dtype != "bfloat16":
        return
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim not in _ROTARY_HEAD_SIZES:
        raise ValueError(
            f"head_dim = {head_dim} of {path}: SGLang's kernel for a Qwen3-MoE in bfloat16 knows {_ROTARY_HEAD_SIZES}; "
            "train and generate in float32, or use a model with such heads"
        )
