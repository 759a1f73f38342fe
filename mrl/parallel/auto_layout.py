"""Checks a parallel layout against a model, and chooses the smallest one that fits the memory. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import count_params, expert_params
from mrl.reshard.spec import ModelSpec

_GIB = 2**30


@dataclass(kw_only=True, frozen=True)
class BytesPerParameter:
    """Memory of one parameter on the rank that computes with it."""

    weight: float
    gradient: float = 0.0
    optimizer: float = 0.0
    """Main copy and moments."""
    optimizer_is_sharded: bool = False
    """Distributed optimizer: data-parallel ranks share main copies and moments out among themselves."""

    @classmethod
    def of(cls, *, weight: int, trained: bool, distributed_optimizer: bool = True) -> BytesPerParameter:
        """For Adam with float32 gradients and moments, and a float32 main copy beside weights of lower precision.

        Args:
            weight: bytes of a weight: 4 for float32, 2 for bfloat16.
            trained: False for a reference model, which has weights only.
            distributed_optimizer: whether the optimizer state is sharded over data-parallel ranks.
        """
        if not trained:
            return cls(weight=weight)
        main_copy = 0 if weight == 4 else 4
        return cls(weight=weight, gradient=4, optimizer=main_copy + 8, optimizer_is_sharded=distributed_optimizer)

    def total(self, dp: int) -> float:
        """Bytes of one parameter on one of `dp` data-parallel ranks."""
        return self.weight + self.gradient + self.optimizer / (dp if self.optimizer_is_sharded else 1)


def check_layout(layout: ParallelLayout, spec: ModelSpec) -> None:
    """Raise ValueError, with the numbers and what to change, unless `layout` divides heads, layers and experts."""
    problem = _tp_problem(layout.tp, spec) or _pp_problem(layout.pp, layout.vpp, spec) or _expert_problem(layout, spec)
    if problem:
        raise ValueError(problem)


def choose_layout(
    spec: ModelSpec,
    *,
    world_size: int,
    gpus_per_node: int,
    memory_bytes_per_rank: int,
    bytes_per_parameter: BytesPerParameter,
    sequence_parallel: bool = True,
    ep: int = 1,
    etp: int = 1,
) -> ParallelLayout:
    """The layout with the fewest ranks per model replica whose fullest rank fits the memory.

    Of layouts with equally many ranks the one with more tensor parallelism wins: it stays inside a node, has no
    pipeline bubble and splits activations, too.

    Args:
        spec: the model.
        world_size, gpus_per_node: of the job; tensor-parallel groups never leave a node.
        memory_bytes_per_rank: what weights, gradients and optimizer state of this role may take on a rank, after
            activations, other roles and the rollout engine have had their share.
        bytes_per_parameter: of this role's dtype and optimizer.
        sequence_parallel: set on the result where tp > 1.
        ep, etp: expert-parallel and expert-tensor-parallel size; they are not chosen.

    Raises:
        ValueError: no layout fits; tells how much the best one would need.
    """
    if world_size < 1 or gpus_per_node < 1:
        raise ValueError(f"world_size = {world_size} and gpus_per_node = {gpus_per_node} must be at least 1")
    candidates = _candidates(spec, world_size, gpus_per_node, sequence_parallel, ep=ep, etp=etp)
    if not candidates:
        cut = f" and expert_tensor_parallel_size = {etp}" if etp > 1 else ""
        raise ValueError(
            f"no layout of {world_size} ranks has expert_model_parallel_size = {ep}{cut}; choose a divisor of both the "
            "ranks and the experts"
        )
    needs = [(rank_bytes(layout, spec, bytes_per_parameter), layout) for layout in candidates]
    for need, layout in needs:
        if need <= memory_bytes_per_rank:
            return layout
    need, layout = min(needs, key=lambda pair: pair[0])
    raise ValueError(
        f"no layout of {count_params(spec) / 1e9:.3g} billion parameters over {world_size} ranks fits "
        f"{memory_bytes_per_rank / _GIB:.2f} GiB per rank: the leanest, {layout}, needs {need / _GIB:.2f} GiB for "
        "weights, gradients and optimizer; use more or larger GPUs, the distributed optimizer, or optimizer offload"
    )


def rank_bytes(layout: ParallelLayout, spec: ModelSpec, bytes_per_parameter: BytesPerParameter) -> int:
    """Bytes of weights, gradients and optimizer state on the fullest rank, a stage with a vocabulary matrix."""
    matrices = 1 if spec.tie_word_embeddings else 2
    embedding = spec.vocab_size * spec.hidden_size
    experts = spec.num_hidden_layers * expert_params(spec) / layout.pp
    in_layers = (count_params(spec) - matrices * embedding) / layout.pp - experts
    # With pp > 1 the first and last stage hold one matrix each, tied or not.
    on_stage = in_layers + embedding * (matrices if layout.pp == 1 else 1)
    return round(
        on_stage / layout.tp * bytes_per_parameter.total(layout.dp * layout.cp)
        + experts / (layout.ep * layout.etp) * bytes_per_parameter.total(layout.expert_dp)
    )


def _candidates(
    spec: ModelSpec, world_size: int, gpus_per_node: int, sequence_parallel: bool, *, ep: int, etp: int
) -> list[ParallelLayout]:
    """Layouts that divide model, node and world, smallest replica first, then most tensor parallelism first."""
    layouts = [
        ParallelLayout(
            world_size=world_size, tp=tp, pp=pp, ep=ep, etp=etp, sequence_parallel=sequence_parallel and tp > 1
        )
        for tp in _divisors(gpus_per_node)
        for pp in _divisors(spec.num_hidden_layers)
        if world_size % (tp * pp) == 0 and world_size // pp % (ep * etp) == 0 and not _tp_problem(tp, spec)
    ]
    return sorted(layouts, key=lambda layout: (layout.tp * layout.pp, layout.pp))


def _tp_problem(tp: int, spec: ModelSpec) -> str | None:
    if not _tp_divides(tp, spec):
        allowed = [size for size in _divisors(spec.num_attention_heads) if _tp_divides(size, spec)]
        ffn = "" if spec.moe else f", intermediate_size = {spec.intermediate_size}"
        return (
            f"tensor_model_parallel_size = {tp} does not fit num_attention_heads = {spec.num_attention_heads}, "
            f"num_key_value_heads = {spec.num_key_value_heads} (either must divide the other){ffn}; choose one of "
            f"{', '.join(map(str, allowed))}"
        )
    return None


def _tp_divides(tp: int, spec: ModelSpec) -> bool:
    kv_heads = spec.num_key_value_heads
    return (
        spec.num_attention_heads % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
        and (spec.moe is not None or spec.intermediate_size % tp == 0)
    )


def _pp_problem(pp: int, vpp: int | None, spec: ModelSpec) -> str | None:
    chunks = pp * (vpp or 1)
    if spec.num_hidden_layers % chunks == 0:
        return None
    name = "pipeline_model_parallel_size" + (" x virtual_pipeline_model_parallel_size" if vpp else "")
    allowed = ", ".join(map(str, _divisors(spec.num_hidden_layers)))
    return f"{name} = {chunks} does not divide num_hidden_layers = {spec.num_hidden_layers}; make it one of {allowed}"


def _expert_problem(layout: ParallelLayout, spec: ModelSpec) -> str | None:
    if spec.moe is None:
        for name, size in (("expert_model", layout.ep), ("expert_tensor", layout.etp)):
            if size > 1:
                return f"{name}_parallel_size = {size}, but {spec.family} models have no experts; set it to 1"
        return None
    if spec.moe.num_experts % layout.ep:
        allowed = ", ".join(map(str, _divisors(spec.moe.num_experts)))
        return (
            f"expert_model_parallel_size = {layout.ep} does not divide num_experts = {spec.moe.num_experts}; make it "
            f"one of {allowed}"
        )
    if spec.intermediate_size % layout.etp:
        return (
            f"expert_tensor_parallel_size = {layout.etp} does not divide the experts' intermediate size "
            f"{spec.intermediate_size}; choose a divisor"
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        return (
            f"tensor_model_parallel_size = {layout.tp} of a model with experts needs sequence_parallel = true: without "
            "it every rank would send every token to the experts"
        )
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
