"""SGLang's custom weight loader: runs in each scheduler process with the live model and pulls its weights.

The control message is JSON in the name of an empty tensor: SGLang hands loaders (name, tensor) pairs only. Its
`action`:

- `pull`: `layout`, a key; `seed`, for sampling; in the first message of a layout also `spec` (`ModelSpec`) and
  `sources` (a list of `SourceRank`). Plan and opened buffers are kept for the messages that follow.
- `poison`: fill every parameter with NaN, so that a test sees what a pull missed.
- `fingerprint`: report a digest of every parameter.

`fail_on_rank` raises on that rank before anything is done; tests use it.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mrl.backends.sglang import status
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.layout import SourceRank, targets_of
from mrl.reshard.plan import build_plan
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transport import close_buffers, device_number

PATH = "mrl.backends.sglang.weight_loader.load"
"""What `custom_weight_loader` and `load_format` are set to."""

_pullers: dict[str, Puller] = {}
"""At most one: the puller of the current source layout, under its key."""


@torch.no_grad()
def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carry out the control message. Called by every rank of the engine's tp_group.

    Raises:
        ValueError: an unknown action or layout key, or source and engine parameters that do not fit each other.
    """
    control = json.loads(named_tensors[0][0])
    action = control["action"]
    if action not in _ACTIONS:
        raise ValueError(f"unknown weight loader action {action!r}; known: {', '.join(sorted(_ACTIONS))}")
    if control.get("fail_on_rank") == _tp_rank_and_size()[0]:
        raise RuntimeError(f"asked to fail on engine rank {control['fail_on_rank']}")
    _ACTIONS[action](model, control)
    if next(model.parameters()).is_cuda:
        # SGLang answers without waiting for the device; the trainer may change its weights right after.
        torch.cuda.synchronize()


def _pull(model: nn.Module, control: Mapping[str, Any]) -> None:
    key = control["layout"]
    if "sources" in control:
        _pullers.clear()
        close_buffers()
        _pullers[key] = _build_puller(model, control)
    if key not in _pullers:
        raise ValueError(f"this engine rank has no plan of source layout {key}; send spec and sources first")
    result = _pullers[key].pull()
    # Restarting the stream at each version makes a resumed run sample what the unbroken run sampled.
    _seed(control["seed"])
    status.put(bytes=result.bytes, ops=result.ops, seconds=result.seconds, checksum=result.checksum)


def _seed(seed: int) -> None:
    # Not torch.manual_seed: for each kind of device that is absent it formats a stack trace, 1 ms together.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _build_puller(model: nn.Module, control: Mapping[str, Any]) -> Puller:
    # Imported here: the module is also imported where no engine runs.
    from mrl.backends.sglang.experts import expert_parallel_size

    tp_rank, tp_size = _tp_rank_and_size()
    sources = [SourceRank.from_json(source) for source in control["sources"]]
    params = dict(model.named_parameters())
    plan = build_plan(
        ModelSpec.from_json(control["spec"]),
        sources,
        targets_of(params.items()),
        tp_rank=tp_rank,
        tp_size=tp_size,
        host=socket.gethostname(),
        device=device_number(next(model.parameters()).device),
        ep_size=expert_parallel_size(model),
    )
    return Puller(plan, open_sources(plan, sources), params)


def _poison(model: nn.Module, control: Mapping[str, Any]) -> None:
    for param in model.parameters():
        param.fill_(float("nan"))


def _fingerprint(model: nn.Module, control: Mapping[str, Any]) -> None:
    status.put(parameters={name: _digest(param) for name, param in model.named_parameters()})


def _digest(param: Tensor) -> str:
    return hashlib.sha256(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _tp_rank_and_size() -> tuple[int, int]:
    # Imported here: the module is also imported where no engine runs.
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return group.rank_in_group, group.world_size


_ACTIONS: dict[str, Callable[[nn.Module, Mapping[str, Any]], None]] = {
    "pull": _pull,
    "poison": _poison,
    "fingerprint": _fingerprint,
}
