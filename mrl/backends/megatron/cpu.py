"""Runs megatron-core unpatched on machines without CUDA, over gloo.

Megatron names CUDA directly: `torch.cuda.current_device()`, `device="cuda"`, CUDA random states, streams, the type
string "torch.cuda.FloatTensor". Every megatron.core module gets its own copy of the `torch` namespace in which those
names mean the CPU. The one that gathers and scatters tensors of several sizes also gets collectives that do so, which
gloo's do not. torch itself and all other libraries see nothing of it, except three Tensor methods, which look at their
caller.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.token_dispatcher",
)
"""All that mrl uses of megatron: modules imported after the namespaces were replaced would not be covered."""

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")

_NOISY_LOGGERS = (
    # GPTModel is announced as deprecated on every construction; its successor has no value yet for dense models.
    "megatron.core.models.gpt.gpt_model",
    # DDP warns that it computes the distributed optimizer's layout itself, which is what is wanted.
    "megatron.core.distributed.distributed_data_parallel",
)


@functools.cache
def prepare_megatron() -> None:
    """Import megatron-core so that it runs here; without CUDA its CUDA names then mean the CPU. Idempotent.

    Raises:
        RuntimeError: megatron-core was imported before, on a machine without CUDA.
    """
    if not torch.cuda.is_available():
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron.core was imported before mrl.backends.megatron; import the latter first")
        with _light_imports():
            _import_modules()
        _use_cpu_names()
        _replace_cuda_functions()
    else:
        _import_modules()
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Saves are planned with the asynchronous writer, which says on every rank that it is deprecated.
    saving = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    saving.addFilter(lambda record: "async save is deprecated" not in record.getMessage())
    # Only importable once megatron is ready.
    from mrl.backends.megatron.adam import install_adam_if_missing

    install_adam_if_missing()


def _import_modules() -> None:
    with warnings.catch_warnings():
        # "Falling back to Torch optimizers": adam.py takes their place.
        warnings.simplefilter("ignore", UserWarning)
        for name in _MODULES:
            importlib.import_module(name)


@contextlib.contextmanager
def _light_imports() -> Iterator[None]:
    """torch.compile off and flashinfer hidden: megatron's module-level use of them costs 5 s and 190 MB."""
    compile_function = torch.compile
    hide = "flashinfer" not in sys.modules
    setattr(torch, "compile", lambda model=None, **_: model if model is not None else (lambda inner: inner))  # noqa: B010
    if hide:
        sys.modules["flashinfer"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function
        if hide:
            del sys.modules["flashinfer"]


class _NoStream:
    """Stands for a CUDA stream or event: there is nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: _NoStream | None = None) -> _NoStream:
        return event or _NoStream()

    def query(self) -> bool:
        return True

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    wait_event = wait_stream = record = wait = synchronize = _ignore


def _use_cpu_names() -> None:
    """Give each megatron.core module a `torch` whose CUDA names mean the CPU, and adapt three Tensor methods."""
    cuda = _namespace_with(
        torch.cuda,
        Stream=_NoStream,
        Event=_NoStream,
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda device=None: _NoStream(),
        synchronize=lambda device=None: None,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        stream=lambda stream: contextlib.nullcontext(),
    )
    cpu_torch = _namespace_with(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            setattr(module, "torch", cpu_torch)  # noqa: B010
    collectives = _namespace_with(
        torch.distributed, all_gather=_gather_of_several_sizes, reduce_scatter=_reduce_scatter_of_several_sizes
    )
    mappings = sys.modules["megatron.core.tensor_parallel.mappings"]
    setattr(mappings, "torch", _namespace_with(cpu_torch, distributed=collectives))  # noqa: B010
    _adapt_method("cuda", lambda original, tensor, *args, **kwargs: tensor)
    _adapt_method("pin_memory", lambda original, tensor, *args, **kwargs: tensor)
    _adapt_method("type", _cuda_type_name)


def _namespace_with(module: types.ModuleType, **replaced: Any) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(replaced)
    return copy


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor factory with device="cuda" read as the CPU and without pinning."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _gather_of_several_sizes(tensors: Sequence[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """`all_gather` as NCCL does it where sizes differ, which gloo refuses: every rank broadcasts its own.

    Ranks that share an expert have other numbers of tokens for it.
    """
    tensors[group.rank()].copy_(tensor)
    for rank, each in enumerate(tensors):
        if each.numel():
            dist.broadcast(each, group=group, group_src=rank)


def _reduce_scatter_of_several_sizes(
    output: torch.Tensor, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> None:
    """`reduce_scatter` in the same manner: a sum for every rank."""
    for rank, each in enumerate(tensors):
        # A rank that does not receive the sum has something unspecified in its place.
        total = each.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.reduce(total, group=group, group_dst=rank)
        if rank == group.rank():
            output.copy_(total)


def _adapt_method(name: str, replacement: Callable[..., Any]) -> None:
    """Replace a Tensor method for callers inside megatron only."""
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return replacement(original, tensor, *args, **kwargs)
        return original(tensor, *args, **kwargs)

    setattr(torch.Tensor, name, method)


def _cuda_type_name(original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Optimizers pick parameters by the name "torch.cuda.FloatTensor"."""
    if args or kwargs:
        return original(tensor, *args, **kwargs)
    return original(tensor).replace("torch.", "torch.cuda.", 1)


def _replace_cuda_functions() -> None:
    """Replace the three functions that a namespace cannot reach."""
    random = sys.modules["megatron.core.tensor_parallel.random"]
    setattr(random, "_get_cuda_rng_state", lambda device=None, clone=False, graph_safe=False: torch.get_rng_state())  # noqa: B010
    setattr(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))  # noqa: B010
    # The tracker compares CPU states around each fork; here the CPU's is the one that is meant to change.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    setattr(dispatcher, "maybe_move_tensor_to_cpu", _split_sizes)  # noqa: B010


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
