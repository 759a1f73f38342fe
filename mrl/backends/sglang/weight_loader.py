"""SGLang's custom weight loader: runs in each scheduler process with the live model and pulls its weights.

The control message is JSON in the name of an empty tensor: SGLang hands loaders (name, tensor) pairs only. Its
`action`:

- `pull`: `layout`, a key; `round`, another one for every update of a layout; `seed`, for sampling; in the first message
  of a layout also `spec` (`ModelSpec`) and `sources` (`sources_to_json`), and where the job has several engines or
  hosts, `engines`: `hosts` and `devices` of all engine ranks, `first_rank` of this engine, whether `copy_engines` may
  bring weights, `meeting` (`MeetingPoint`). Plan, opened buffers and connections are kept for the messages that follow,
  until one fails.
- `capture`: capture the CUDA graphs that waited for the parameters' addresses.
- `poison`: fill every parameter with NaN, so that a test sees what a pull missed; not those that are the trainer's
  memory.
- `fingerprint`: report a digest of every parameter.

`fail_on_rank` raises on that rank before anything is done; tests use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mrl.backends.sglang import aliasing, graphs, status
from mrl.backends.sglang.engine_group import EngineGroup, MeetingPoint
from mrl.reshard.delivery import Delivery
from mrl.reshard.layout import sources_from_json, targets_of
from mrl.reshard.peers import COPY_ENGINE_BYTES
from mrl.reshard.plan import build_plan
from mrl.reshard.routes import EnginePlaces
from mrl.reshard.spec import ModelSpec
from mrl.reshard.transport import close_buffers, device_number

PATH = "mrl.backends.sglang.weight_loader.load"
"""What `custom_weight_loader` and `load_format` are set to."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """What an update of a layout needs, in this process."""

    delivery: Delivery
    group: EngineGroup | None
    """Only where engine ranks send each other weights."""


_bound: dict[str, _Bound] = {}
"""At most one: of the current source layout, under its key."""


@torch.no_grad()
def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carry out the control message. Called by every rank of the engine's tp_group.

    Raises:
        ValueError: an unknown action or layout key, or source and engine parameters that do not fit each other.
        ReshardError: what arrived is not what was sent, or a peer on another host cannot go on.
    """
    control = json.loads(named_tensors[0][0])
    action = control["action"]
    if action not in _ACTIONS:
        raise ValueError(f"unknown weight loader action {action!r}; known: {', '.join(sorted(_ACTIONS))}")
    try:
        if control.get("fail_on_rank") == _tp_rank_and_size()[0]:
            raise RuntimeError(f"asked to fail on engine rank {control['fail_on_rank']}")
        _ACTIONS[action](model, control)
    except Exception as error:
        if action == "pull":
            _give_up(model, control, error)
        raise
    if next(model.parameters()).is_cuda:
        # SGLang answers without waiting for the device; the trainer may change its weights right after.
        torch.cuda.synchronize()


def _pull(model: nn.Module, control: Mapping[str, Any]) -> None:
    key = control["layout"]
    if "sources" in control:
        _forget()
        _bound[key] = _bind(model, control)
    if key not in _bound:
        raise ValueError(f"this engine rank has no plan of source layout {key}; send spec and sources first")
    delivery, group = _bound[key].delivery, _bound[key].group
    if group is not None:
        group.begin(str(control["round"]))
    result = delivery.run(group)
    # Restarting the stream at each version makes a resumed run sample what the unbroken run sampled.
    _seed(control["seed"])
    stats = delivery.plan.stats
    status.put(
        bytes=stats.bytes,
        local_bytes=stats.local_bytes,
        aliased_bytes=stats.aliased_bytes,
        remote_bytes=result.exchange.received_bytes,
        sent_bytes=result.exchange.sent_bytes,
        ops=stats.copies + stats.fills,
        seconds=result.seconds,
        checksum=result.pull.checksum,
        peer_sums=result.pull.sums.to_json(),
        graphs_wait=graphs.is_waiting(),
    )


def _give_up(model: nn.Module, control: Mapping[str, Any], error: Exception) -> None:
    """Tell the engine ranks of other hosts that this one fails; they may be waiting for it."""
    group = next((bound.group for bound in _bound.values()), None)
    if group is None and len(set(control.get("engines", {}).get("hosts", ()))) > 1:
        group = _group(model, control, _places(control))
    if group is not None:
        # The store may be the very thing that failed; the error at hand says more.
        with suppress(dist.DistError):
            group.give_up(str(control["round"]), f"{type(error).__name__}: {error}")
    # Nothing can be unmapped after an illegal access, and its error is the one to report.
    with suppress(RuntimeError):
        _forget()


def _forget() -> None:
    for bound in _bound.values():
        if bound.group is not None:
            bound.group.close()
    _bound.clear()
    if not aliasing.bound():
        close_buffers()


def _seed(seed: int) -> None:
    # Not torch.manual_seed: for each kind of device that is absent it formats a stack trace, 1 ms together.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _bind(model: nn.Module, control: Mapping[str, Any]) -> _Bound:
    # Imported here: the module is also imported where no engine runs.
    from mrl.backends.sglang.experts import expert_parallel_size

    sources, places = sources_from_json(control["sources"]), _places(control)
    params = dict(model.named_parameters())
    plan = build_plan(
        ModelSpec.from_json(control["spec"]),
        sources,
        targets_of(params.items()),
        tp_rank=places.tp_rank,
        tp_size=places.tp_size,
        host=places.host,
        device=device_number(next(model.parameters()).device),
        ep_size=expert_parallel_size(model),
        places=places,
        alias=aliasing.is_on(),
        copy_engine_bytes=COPY_ENGINE_BYTES if control.get("engines", {}).get("copy_engines") else None,
    )
    if plan.aliases:
        graphs.check_put_off()
    group = _group(model, control, places) if plan.crosses_hosts else None
    with aliasing.rebinding(plan, params, on_move=graphs.invalidate):
        delivery = Delivery(plan, sources, params, places)
    return _Bound(delivery, group)


def _places(control: Mapping[str, Any]) -> EnginePlaces:
    tp_rank, tp_size = _tp_rank_and_size()
    engines = control.get("engines")
    if engines is None:
        return EnginePlaces(hosts=(control["sources"][0]["host"],) * tp_size, tp_size=tp_size, rank=tp_rank)
    rank, devices = engines["first_rank"] + tp_rank, tuple(engines["devices"])
    return EnginePlaces(hosts=tuple(engines["hosts"]), devices=devices, tp_size=tp_size, rank=rank)


def _group(model: nn.Module, control: Mapping[str, Any], places: EnginePlaces) -> EngineGroup:
    meeting = MeetingPoint(**control["engines"]["meeting"])
    return EngineGroup(meeting, places, next(model.parameters()).device)


def _poison(model: nn.Module, control: Mapping[str, Any]) -> None:
    for name, param in model.named_parameters():
        if name not in aliasing.bound():
            param.fill_(float("nan"))


def _capture(model: nn.Module, control: Mapping[str, Any]) -> None:
    status.put(graph_gib=graphs.capture())


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
    "capture": _capture,
    "poison": _poison,
    "fingerprint": _fingerprint,
}
