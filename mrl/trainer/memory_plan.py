"""Who will hold how much memory in which phase, from sizes alone, before anything starts.

Counted is what follows from the configuration: weights, gradients, optimizer state, the engine's weights and KV cache.
Roles take turns with what they offload for an update, gradients and optimizer state: the largest turn counts.
Activations, CUDA contexts and graphs, communication buffers and workspaces come on top; what is left for them is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrl.parallel.auto_layout import BytesPerParameter, rank_bytes
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.exchange import SLOTS, STAGING_BYTES
from mrl.reshard.families import count_params, expert_params
from mrl.reshard.spec import ModelSpec

_GIB = 2**30


@dataclass(kw_only=True, frozen=True)
class RoleMemory:
    """One role's model and what of it leaves the device during the rollout."""

    name: str
    spec: ModelSpec
    layout: ParallelLayout
    bytes_per_parameter: BytesPerParameter
    offloads_weights: bool = False
    offloads_gradients: bool = False
    """Released: they cost no host memory."""
    offloads_optimizer: bool = False


@dataclass(kw_only=True, frozen=True)
class EngineMemory:
    """The rollout engines."""

    spec: ModelSpec
    tp: int
    bytes_per_weight: int
    static_fraction: float | None
    """Share of the device for weights and KV cache; None where the cache has a size of its own, on CPU."""
    kv_tokens: int = 0
    """Tokens in that cache."""
    releases: bool = False
    """Gives both back while the trainer works."""
    crosses_hosts: bool = False
    """Weights may come from engine ranks of other hosts."""
    aliased_bytes: int = 0
    """Of each rank's weights, those that are the actor's memory."""


@dataclass(kw_only=True, frozen=True)
class MemoryItem:
    """Bytes on one device: while the trainer works, and while engines generate."""

    name: str
    training: int
    rollout: int
    host: int = 0
    """Bytes that wait in pinned host memory meanwhile."""
    turn: str | None = None
    """The role during whose updates alone the training bytes are there; None is all the time."""

    @property
    def label(self) -> str:
        """The name, and whether it is there in turn only."""
        return f"{self.name}, in turn" if self.turn else self.name


@dataclass(kw_only=True, frozen=True)
class MemoryPlan:
    """The items of one device, or on CPU of one host, and what there is."""

    items: Sequence[MemoryItem]
    capacity: int
    host_capacity: int
    """For what waits there: a rank's share of the host's memory."""

    def rows(self) -> list[tuple[str, str]]:
        """A line per item, then what is left."""
        lines = [(item.label, _pair(item.training, item.rollout)) for item in self.items]
        training, rollout, host = (sum(shares) for shares in (self._training(), *self._elsewhere()))
        lines.append(("left for activations and runtime", _pair(self.capacity - training, self.capacity - rollout)))
        if host:
            lines.append(("in host memory meanwhile", f"{host / _GIB:.2f} of {self.host_capacity / _GIB:.2f}"))
        return lines

    def check(self) -> None:
        """Raise ValueError, with every item, if a phase cannot fit."""
        rollout, host = self._elsewhere()
        needs = (
            ("training", self._training(), self.capacity, _TRAINING_REMEDY),
            ("the rollout", rollout, self.capacity, _ROLLOUT_REMEDY),
            ("host memory for what is offloaded", host, self.host_capacity, _HOST_REMEDY),
        )
        for phase, shares, capacity, remedy in needs:
            need = sum(shares)
            if need > capacity:
                named = zip(self.items, shares, strict=True)
                listed = ", ".join(f"{item.name} {share / _GIB:.2f}" for item, share in named if share)
                raise ValueError(
                    f"{phase} needs {need / _GIB:.2f} GiB ({listed}), but there are {capacity / _GIB:.2f} GiB, before "
                    f"any activation; {remedy}"
                )

    def _training(self) -> list[int]:
        """Bytes of each item when the trainer holds most."""
        turns: dict[str, int] = {}
        for item in self.items:
            if item.turn:
                turns[item.turn] = turns.get(item.turn, 0) + item.training
        largest = max(turns, key=turns.__getitem__, default=None)
        return [item.training if item.turn in (None, largest) else 0 for item in self.items]

    def _elsewhere(self) -> tuple[list[int], list[int]]:
        """Bytes of each item during the rollout, on the device and on the host."""
        return [item.rollout for item in self.items], [item.host for item in self.items]


_TRAINING_REMEDY = (
    "use more tensor or pipeline parallelism, the distributed optimizer, more GPUs, have roles take turns "
    "(optimizer_offload and grad_offload of actor.megatron and critic.megatron), or release the engine's memory "
    "(rollout.free_cache_engine=True)"
)
_ROLLOUT_REMEDY = (
    "lower rollout.gpu_memory_utilization, raise rollout.tensor_model_parallel_size, or offload during the rollout "
    "(actor.megatron.optimizer_offload, critic.megatron.param_offload and optimizer_offload)"
)
_HOST_REMEDY = "offload less, or use more hosts"


def plan_device_memory(
    roles: Sequence[RoleMemory], engine: EngineMemory, *, gpu_bytes: int, host_bytes_per_rank: int
) -> MemoryPlan:
    """The memory of the fullest GPU.

    Raises:
        ValueError: the engine's weights do not fit its own share of the device.
    """
    items = [item for role in roles for item in _role_items(role)]
    items += _engine_items(engine, gpu_bytes)
    return MemoryPlan(items=items, capacity=gpu_bytes, host_capacity=host_bytes_per_rank)


def plan_host_memory(
    roles: Sequence[RoleMemory], engine: EngineMemory, *, num_engines: int, host_bytes: int
) -> MemoryPlan:
    """The memory of one CPU host that runs every rank: nothing leaves it, and phases do not differ."""
    items = [_constant(role.name, _bytes_of_all_ranks(role)) for role in roles]
    weights = max(0, engine.bytes_per_weight * count_params(engine.spec) - engine.tp * engine.aliased_bytes)
    items.append(_constant("engine weights", num_engines * weights))
    items.append(_constant("KV cache", num_engines * engine.kv_tokens * kv_bytes_per_token(engine)))
    return MemoryPlan(items=items, capacity=host_bytes, host_capacity=host_bytes)


def kv_bytes_per_token(engine: EngineMemory) -> int:
    """Keys and values of one token in all layers and heads, over all ranks of an engine."""
    spec = engine.spec
    return 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * engine.bytes_per_weight


def _bytes_of_all_ranks(role: RoleMemory) -> int:
    spec, layout, per = role.spec, role.layout, role.bytes_per_parameter
    tied_copy = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings and layout.pp > 1 else 0
    experts = spec.num_hidden_layers * expert_params(spec)
    replicas = layout.dp * layout.cp
    # Tensor-parallel ranks do not share an expert: with more of them there are more copies.
    expert_replicas = layout.expert_dp
    dense = count_params(spec) + tied_copy - experts
    return round(dense * per.total(replicas) * replicas + experts * per.total(expert_replicas) * expert_replicas)


def _role_items(role: RoleMemory) -> list[MemoryItem]:
    per = role.bytes_per_parameter
    parts = (
        ("weights", BytesPerParameter(weight=per.weight), role.offloads_weights, True),
        ("gradients", BytesPerParameter(weight=per.gradient), role.offloads_gradients, False),
        (
            "optimizer",
            BytesPerParameter(weight=0, optimizer=per.optimizer, optimizer_is_sharded=per.optimizer_is_sharded),
            role.offloads_optimizer,
            True,
        ),
    )
    items = []
    for name, part, leaves, waits_on_host in parts:
        size = rank_bytes(role.layout, role.spec, part)
        if size:
            items.append(
                MemoryItem(
                    name=f"{role.name} {name}",
                    training=size,
                    rollout=0 if leaves else size,
                    host=size if leaves and waits_on_host else 0,
                    turn=role.name if leaves and name != "weights" else None,
                )
            )
    return items


def _engine_items(engine: EngineMemory, gpu_bytes: int) -> list[MemoryItem]:
    assert engine.static_fraction is not None, "on a GPU the engine takes a share of it"
    weights = engine.bytes_per_weight * count_params(engine.spec) // engine.tp
    static = int(engine.static_fraction * gpu_bytes)
    if weights >= static:
        raise ValueError(
            f"the engine's weights take {weights / _GIB:.2f} GiB of each GPU at TP{engine.tp}, and "
            f"rollout.gpu_memory_utilization = {engine.static_fraction} gives them and the KV cache "
            f"{static / _GIB:.2f} of {gpu_bytes / _GIB:.2f} GiB; raise it, or rollout.tensor_model_parallel_size"
        )
    cache = static - weights
    # In the first update there are both copies of the weights, but no cache yet.
    sizes = (("engine weights", weights - min(engine.aliased_bytes, weights, cache)), ("KV cache", cache))
    items = [MemoryItem(name=name, training=0 if engine.releases else size, rollout=size) for name, size in sizes]
    if engine.crosses_hosts:
        # Both directions; taken during an update of the weights, while the engine has its memory.
        items.append(MemoryItem(name="messages between hosts", training=0, rollout=2 * SLOTS * STAGING_BYTES))
    return items


def _constant(name: str, num_bytes: int) -> MemoryItem:
    return MemoryItem(name=name, training=num_bytes, rollout=num_bytes)


def _pair(training: int, rollout: int) -> str:
    return f"{training / _GIB:9.2f} training   {rollout / _GIB:9.2f} rollout"
