"""Under which key, and at which leading indices, a torch_dist checkpoint keeps a parameter of Megatron's GPTModel.

The layers of a model are one tensor [layers, ...] per kind of parameter, its experts one [layers, experts, ...]. Norms
before a linear layer have the name that transformer-engine gives them, whichever layers wrote the checkpoint.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mrl.reshard.families import tensor_shapes
from mrl.reshard.reference import megatron_shard
from mrl.reshard.spec import ModelSpec

OPTIMIZER_PREFIX = "optimizer.state."
LAYERS = "decoder.layers."
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_STORED_EXPERTS = "mlp.experts.experts."
VALUE_HEAD = {"output_layer.weight": "value_head.weight", "output_layer.bias": "value_head.bias"}
"""Stored keys of a critic's head and the names that manifests give it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is stored."""

    key: str
    lead: tuple[int, ...] = ()
    """Indices into the dimensions before the parameter's own."""
    counts: tuple[int, ...] = ()
    """Sizes of these dimensions in the whole model."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A whole parameter (at tensor parallel size 1), its shape without padding, and its place."""

    name: str
    shape: tuple[int, ...]
    place: Place


def model_parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, the experts of a layer one by one; a tied output layer is the embedding."""
    experts = range(spec.moe.num_experts) if spec.moe else range(0)
    shard = megatron_shard(
        {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(spec).items()},
        spec,
        tp_rank=0,
        tp_size=1,
        layers=range(spec.num_hidden_layers),
        pre_process=True,
        post_process=True,
        padded_vocab_size=spec.vocab_size,
        experts=experts,
    )
    parameters = []
    for name, tensor in shard.items():
        stored = _stored_name(spec, name)
        parameters.append(Parameter(stored, tuple(tensor.shape), _place(stored, spec.num_hidden_layers, len(experts))))
    return parameters


def stored_parameters(key: str, shape: tuple[int, ...]) -> Iterator[Parameter]:
    """The parameters that a stored tensor of this name and shape holds; keys of layers may be numbered or stacked."""
    rest = key.removeprefix(LAYERS)
    if rest == key or rest.partition(".")[0].isdecimal():
        yield Parameter(key, shape, Place(key))
        return
    for layer in range(shape[0]):
        if not rest.startswith(_STORED_EXPERTS):
            yield Parameter(f"{LAYERS}{layer}.{rest}", shape[1:], Place(key, (layer,), shape[:1]))
            continue
        kind = rest.removeprefix(_STORED_EXPERTS)
        for expert in range(shape[1]):
            name = f"{LAYERS}{layer}.mlp.experts.local_experts.{expert}.{kind}"
            yield Parameter(name, shape[2:], Place(key, (layer, expert), shape[:2]))


def _stored_name(spec: ModelSpec, name: str) -> str:
    """`name` with the norm's name in transformer-engine's layers, where they fuse it."""
    for plain, fused in _FUSED_NORMS.items():
        # What follows the norm before experts is no linear layer.
        if not (spec.moe and plain.startswith("pre_mlp")):
            name = name.replace(f".{plain}", f".{fused}")
    return name


def _place(name: str, layers: int, experts: int) -> Place:
    match = _LAYER.match(name)
    if match is None:
        return Place(name)
    layer, rest = int(match[1]), match[2]
    expert = _LOCAL_EXPERT.match(rest)
    if expert:
        return Place(f"{LAYERS}{_STORED_EXPERTS}{expert[2]}", (layer, int(expert[1])), (layers, experts))
    return Place(LAYERS + rest, (layer,), (layers,))


def expert_of(parameter: Parameter) -> int | None:
    """The number of the expert that a parameter belongs to."""
    return parameter.place.lead[1] if len(parameter.place.lead) > 1 else None


def pickled_objects(parameters: Iterable[Parameter]) -> Iterator[tuple[str, bytes]]:
    """What megatron-core looks for beside the tensors: its common state, and the empty extra state of linear layers."""
    yield "common_state/shard_0_1", _pickled([{"content_metadata": {}}])
    for parameter in parameters:
        place, module = parameter.place, parameter.place.key.rpartition(".")[0]
        if place.key.endswith(".weight") and ".linear_" in place.key and place.lead:
            at, of = ".".join(map(str, place.lead)), ".".join(map(str, place.counts))
            yield f"{module}._extra_state/shard_{at}_{of}", _pickled([None])


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
