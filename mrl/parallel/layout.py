"""Parallel layout of one role: how the ranks of a job factor into tp x cp x dp x pp. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes. Ranks count tp fastest, then cp, dp, pp (Megatron's tp-cp-ep-dp-pp order)."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); None is off."""
    cp: int = 1
    ep: int = 1
    """Parts into which the experts are dealt out over consecutive ranks of a stage; 1 for dense models."""
    etp: int = 1
    """Consecutive ranks that share each expert, whatever tp is; 1 for dense models."""
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in ("world_size", "tp", "pp", "cp", "ep", "etp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} = {getattr(self, axis)} must be at least 1")
        product = self.tp * self.pp * self.cp
        if self.world_size % product:
            raise ValueError(
                f"tensor ({self.tp}) x pipeline ({self.pp}) x context ({self.cp}) parallel size = {product} does not "
                f"divide world size {self.world_size}; lower one or start more processes"
            )
        if self._per_stage % (self.ep * self.etp):
            cut = "expert_tensor_parallel_size x " if self.etp > 1 else ""
            raise ValueError(
                f"{cut}expert_model_parallel_size = {self.ep * self.etp} does not divide the {self._per_stage} ranks "
                "of a pipeline stage; choose a divisor"
            )
        if self.vpp is not None and (self.vpp < 2 or self.pp < 2):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size = {self.vpp} needs a value of at least 2 and "
                f"pipeline_model_parallel_size = {self.pp} of at least 2; leave it null otherwise"
            )

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self._per_stage // (self.ep * self.etp)

    @property
    def _per_stage(self) -> int:
        return self.world_size // self.pp

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tp_rank, cp_rank, dp_rank, pp_rank) of a global rank."""
        tp_rank, rest = rank % self.tp, rank // self.tp
        cp_rank, rest = rest % self.cp, rest // self.cp
        return tp_rank, cp_rank, rest % self.dp, rest // self.dp

    def ep_rank(self, rank: int) -> int:
        """Place of a global rank among those that share out the experts."""
        return rank % self._per_stage // self.etp % self.ep

    def etp_rank(self, rank: int) -> int:
        """Place of a global rank among those that share its experts; they count faster than `ep_rank`."""
        return rank % self._per_stage % self.etp

    def experts_of(self, num_experts: int, ep_rank: int) -> range:
        """Global numbers of the experts on an expert-parallel rank; ValueError if they cannot be shared out evenly."""
        if num_experts % self.ep:
            raise ValueError(
                f"expert_model_parallel_size = {self.ep} does not divide num_experts = {num_experts}; choose a divisor"
            )
        share = num_experts // self.ep
        return range(share * ep_rank, share * (ep_rank + 1))

    def layers_of(self, num_layers: int, pp_rank: int, vp_stage: int | None = None) -> range:
        """Global indices of the layers on a pipeline stage (and virtual stage), evenly split."""
        chunks = self.vpp or 1
        per_chunk, rest = divmod(num_layers, self.pp * chunks)
        if rest:
            raise ValueError(
                f"num_hidden_layers = {num_layers} is not divisible by pipeline_model_parallel_size = {self.pp} x "
                f"virtual_pipeline_model_parallel_size = {chunks}"
            )
        first = ((vp_stage or 0) * self.pp + pp_rank) * per_chunk
        return range(first, first + per_chunk)

    def __str__(self) -> str:
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        parts += [f"VPP{self.vpp}"] if self.vpp else []
        parts += [f"CP{self.cp}"] if self.cp > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        parts += [f"ETP{self.etp}"] if self.etp > 1 else []
        return " x ".join([*parts, f"DP{self.dp}"]) + (" + SP" if self.sequence_parallel and self.tp > 1 else "")
